// Row kernels for AVX2 with FMA, compiled by target pragma and chosen at run time.
#include "cpu/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")

namespace megatron_vopd::cpu {
namespace {

#include "cpu/conversions.h"

struct Simd {
    static constexpr int width = 8;
    using F = __m256;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const Bf16* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static __m128i to_bf16(F a) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static void store(Bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
    static void stream(float* p, F a) { _mm256_stream_ps(p, a); }
    static void stream(Bf16* p, F a) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
    }
    static void fence() { _mm_sfence(); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F affine(F a, F b, F c) { return fma(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F zero_where_zero(F value, F weight) {
        return _mm256_and_ps(value, _mm256_cmp_ps(weight, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    }
    // `close` where |w| < kSmallRatio, else `apart` (also where w is NaN).
    static F where_small(F w, F close, F apart) {
        const F magnitude = _mm256_andnot_ps(set1(-0.0f), w);
        return _mm256_blendv_ps(apart, close,
                                _mm256_cmp_ps(magnitude, set1(kSmallRatio), _CMP_LT_OQ));
    }
    static float horizontal_max(F a) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    static bool all_below(F a, float limit) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, set1(limit), _CMP_LT_OQ)) == 0xff;
    }
    static bool all_finite(F a) {
        // x - x is 0 for numbers, NaN for NaN and infinities.
        const F zero = _mm256_setzero_ps();
        return _mm256_movemask_ps(_mm256_cmp_ps(sub(a, a), zero, _CMP_EQ_OQ)) == 0xff;
    }
    static void add_to_double(double* total, F a) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
        _mm256_store_pd(total, _mm256_add_pd(_mm256_load_pd(total), low));
        _mm256_store_pd(total + 4, _mm256_add_pd(_mm256_load_pd(total + 4), high));
    }
    static unsigned mask_at_least(F a, F b) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
    }
    static unsigned mask_greater(F a, F b) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
    }

    // 2^t: t = n + r with |r| <= 1/2 by the rounding of a large addend, a polynomial in r, and n
    // added to the exponent. NaN stays NaN, below 2^-126 is 0, from 2^128 on is infinite.
    static F exp2(F t) {
        const F low = set1(-126.0f), high = set1(128.0f), magic = set1(12582912.0f);
        const F clamped = _mm256_min_ps(_mm256_max_ps(t, low), high);
        const F shifted = add(clamped, magic);
        const F r = sub(clamped, sub(shifted, magic));
        F p = fma(set1(kExp2[0]), r, set1(kExp2[1]));
        for (int degree = 2; degree <= kExp2Degree; ++degree) {
            p = fma(p, r, set1(kExp2[degree]));
        }
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
        p = _mm256_blendv_ps(p, set1(std::numeric_limits<float>::infinity()),
                             _mm256_cmp_ps(t, high, _CMP_GE_OQ));
        p = _mm256_andnot_ps(_mm256_cmp_ps(t, low, _CMP_LT_OQ), p);
        return _mm256_blendv_ps(p, t, _mm256_cmp_ps(t, t, _CMP_UNORD_Q));
    }
};

#include "cpu/row_stats.h"
// Uses what row_stats.h defines.
#include "cpu/row_topk.h"
// The same.
#include "cpu/row_gradient.h"

}  // namespace

RowKernels avx2_kernels() {
    return {stats_rows<float>, stats_rows<Bf16>, gradient_rows<float>, gradient_rows<Bf16>};
}

}  // namespace megatron_vopd::cpu

#pragma GCC pop_options
#endif
