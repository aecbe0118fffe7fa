// Row kernels in plain C++: vectors of four, left to the compiler. The fallback everywhere.
#include "cpu/scalar.h"

namespace megatron_vopd::cpu {
namespace {

#include "cpu/conversions.h"

struct Simd {
    static constexpr int width = 4;
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));

    static F load(const float* p) {
        F out;
        std::memcpy(&out, p, sizeof(out));
        return out;
    }
    static F load(const Bf16* p) {
        F out;
        for (int i = 0; i < width; ++i) {
            out[i] = to_float(p[i]);
        }
        return out;
    }
    template <typename T>
    static void store(T* p, F a) {
        for (int i = 0; i < width; ++i) {
            from_float(a[i], p + i);
        }
    }
    template <typename T>
    static void stream(T* p, F a) {
        store(p, a);
    }
    static void fence() {}
    static F set1(float value) { return value - F{}; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    // Rounded twice where the target has no fused form: good enough for sums.
    static F fma(F a, F b, F c) { return a * b + c; }
    // Rounded once: a common offset of all logits must not cost their differences.
    static F affine(F a, F b, F c) {
        typedef double D __attribute__((vector_size(32)));
        const D product = __builtin_convertvector(a, D) * __builtin_convertvector(b, D);
        return __builtin_convertvector(product + __builtin_convertvector(c, D), F);
    }
    static F max(F a, F b) { return a > b ? a : b; }
    static F zero_where_zero(F value, F weight) { return weight == F{} ? F{} : value; }
    // `close` where |w| < kSmallRatio, else `apart` (also where w is NaN).
    static F where_small(F w, F close, F apart) {
        const F magnitude = w < F{} ? -w : w;
        return magnitude < set1(kSmallRatio) ? close : apart;
    }
    static float horizontal_max(F a) {
        float most = a[0];
        for (int i = 1; i < width; ++i) {
            most = a[i] > most ? a[i] : most;
        }
        return most;
    }
    static unsigned bits(I mask) {
        unsigned out = 0;
        for (int i = 0; i < width; ++i) {
            out |= static_cast<unsigned>(mask[i] & 1) << i;
        }
        return out;
    }
    static bool all_below(F a, float limit) { return bits(a < set1(limit)) == 0xf; }
    // x - x is 0 for numbers, NaN for NaN and infinities.
    static bool all_finite(F a) { return bits(a - a == F{}) == 0xf; }
    static void add_to_double(double* total, F a) {
        for (int i = 0; i < width; ++i) {
            total[i] += a[i];
        }
    }
    static unsigned mask_at_least(F a, F b) { return bits(a >= b); }
    static unsigned mask_greater(F a, F b) { return bits(a > b); }

    // 2^t: t = n + r with |r| <= 1/2 by the rounding of a large addend, a polynomial in r, and n
    // added to the exponent. NaN stays NaN, below 2^-126 is 0, from 2^128 on is infinite.
    static F exp2(F t) {
        const F low = set1(-126.0f), high = set1(128.0f), magic = set1(12582912.0f);
        F clamped = t < low ? low : t;
        clamped = clamped > high ? high : clamped;
        const F shifted = clamped + magic;
        const F r = clamped - (shifted - magic);
        F p = set1(kExp2[0]);
        for (int degree = 1; degree <= kExp2Degree; ++degree) {
            p = p * r + kExp2[degree];
        }
        p = reinterpret_cast<F>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
        p = t >= high ? set1(std::numeric_limits<float>::infinity()) : p;
        p = t < low ? F{} : p;
        return t != t ? t : p;
    }
};

#include "cpu/row_stats.h"
// Uses what row_stats.h defines.
#include "cpu/row_topk.h"
// The same.
#include "cpu/row_gradient.h"

}  // namespace

RowKernels portable_kernels() {
    return {stats_rows<float>, stats_rows<Bf16>, gradient_rows<float>, gradient_rows<Bf16>};
}

RowKernels row_kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
        case Isa::avx512:
            return avx512_kernels();
        case Isa::avx2:
            return avx2_kernels();
        default:
            break;
    }
#endif
    return portable_kernels();
}

}  // namespace megatron_vopd::cpu
