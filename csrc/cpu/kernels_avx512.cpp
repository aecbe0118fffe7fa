// Row kernels for AVX-512 (F, BW, DQ, VL), compiled by target pragma and chosen at run time.
#include "cpu/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")

namespace megatron_vopd::cpu {
namespace {

#include "cpu/conversions.h"

// 2^(i/16): with the table, a polynomial of degree 3 is exact to 1e-9.
alignas(64) constexpr float kExp2Table[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                                              1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                              1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                              1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

struct Simd {
    static constexpr int width = 16;
    using F = __m512;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const Bf16* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static __m256i to_bf16(F a) {
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static void store(Bf16* p, F a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
    }
    static void stream(float* p, F a) { _mm512_stream_ps(p, a); }
    static void stream(Bf16* p, F a) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
    }
    static void fence() { _mm_sfence(); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F affine(F a, F b, F c) { return fma(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F zero_where_zero(F value, F weight) {
        const __mmask16 keep = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        return _mm512_maskz_mov_ps(keep, value);
    }
    // `close` where |w| < kSmallRatio, else `apart` (also where w is NaN).
    static F where_small(F w, F close, F apart) {
        const __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(w), set1(kSmallRatio), _CMP_LT_OQ);
        return _mm512_mask_blend_ps(small, apart, close);
    }
    static float horizontal_max(F a) { return _mm512_reduce_max_ps(a); }
    static bool all_below(F a, float limit) {
        return _mm512_cmp_ps_mask(a, set1(limit), _CMP_LT_OQ) == 0xffff;
    }
    static bool all_finite(F a) {
        // x - x is 0 for numbers, NaN for NaN and infinities.
        return _mm512_cmp_ps_mask(sub(a, a), _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
    }
    static void add_to_double(double* total, F a) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
        _mm512_store_pd(total, _mm512_add_pd(_mm512_load_pd(total), low));
        _mm512_store_pd(total + 8, _mm512_add_pd(_mm512_load_pd(total + 8), high));
    }
    static unsigned mask_at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static unsigned mask_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

    // 2^t = 2^floor(t) * table[i] * 2^f: i and f are the next four bits of t and the rest. Rounding
    // a large addend down puts i into the low bits; vreduce gives f (0 for infinities); vscalef
    // applies floor(t), with overflow, underflow and NaN as they should be.
    static F exp2(F t) {
        const F shifted = _mm512_add_round_ps(t, set1(12582912.0f / 16),
                                              _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const F power =
            _mm512_permutexvar_ps(_mm512_castps_si512(shifted), _mm512_load_ps(kExp2Table));
        const F f = _mm512_reduce_ps(t, 0x49);
        F p = fma(set1(0.05671815946698189f), f, set1(0.24017904698848724f));
        p = fma(p, f, set1(0.6931477785110474f));
        p = fma(p, f, set1(1.0f));
        return _mm512_scalef_ps(mul(power, p), t);
    }
};

#include "cpu/row_stats.h"
// Uses what row_stats.h defines.
#include "cpu/row_topk.h"
// The same.
#include "cpu/row_gradient.h"

}  // namespace

RowKernels avx512_kernels() {
    return {stats_rows<float>, stats_rows<Bf16>, gradient_rows<float>, gradient_rows<Bf16>};
}

}  // namespace megatron_vopd::cpu

#pragma GCC pop_options
#endif
