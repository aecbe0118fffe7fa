// The gradient at a shard's student logits: one CTA per token. The formula and its constants are
// gradient_row() in distill_stats.h. The label and the top-k entries are computed in double before
// the row is written (it may be written in place) and stored after it.
#include "cuda/device.cuh"

namespace megatron_vopd::cuda {
namespace {

// Entries that one thread holds back: kMaxTopk of the list over kThreads, and the label.
constexpr int kHeld = static_cast<int>(kMaxTopk) / kThreads + 1;

struct Held {
    int64_t id[kHeld];
    float value[kHeld];
    int count = 0;

    __device__ void add(int64_t column, double element) {
        id[count] = column;
        value[count++] = static_cast<float>(element);
    }
};

template <typename T>
__device__ Held special_elements(const Logits& logits, const GradientInputs& in,
                                 const GradientRow& row, int64_t t, const T* x, const T* y) {
    Held held;
    const double* f = in.final_stats + t * kFinalSize;
    const double* c = in.coefficients + t * kCoefficients;
    const int64_t label = logits.labels[t];
    const bool with_list = in.topk > 0 && c[4] != 0;
    const int64_t taken = with_list ? in.topk_taken[t] : 0;
    for (int64_t slot = threadIdx.x; slot < taken; slot += kThreads) {
        const int64_t id = in.topk_ids[t * in.topk + slot];
        const double xv = to_float(x[id]), yv = to_float(y[id]);
        held.add(id, gradient_element(xv, yv, id == label, f, c, row) +
                         topk_element(xv, yv, in.topk_summary + t * kTopkSummary, c[4],
                                      logits.temperature));
    }
    // The label unless the list has it: then its entry above is the whole value.
    if (label >= 0 && label < logits.num_valid) {
        bool listed = false;
        for (int i = 0; i < held.count; ++i) {
            listed = listed || held.id[i] == label;
        }
        listed = __syncthreads_or(listed);
        if (threadIdx.x == kThreads - 1 && !listed) {
            held.add(label,
                     gradient_element(to_float(x[label]), to_float(y[label]), true, f, c, row));
        }
    }
    return held;
}

// 1 - 2^-w for |w| < kSmallRatio.
__device__ inline float ratio_below_one(float w) {
    float p = ratio_coefficient(kRatioDegree);
#pragma unroll
    for (int degree = kRatioDegree - 1; degree >= 0; --degree) {
        p = fmaf(p, w, ratio_coefficient(degree));
    }
    return p * w;
}

template <bool with_ratio, bool with_forward>
__device__ inline float gradient_of(float x, float y, const GradientRow& row) {
    const float tx = (x - row.mx) * row.scale;
    const float e = fast_exp2(tx);
    float inner = fmaf(row.kh, tx, row.k0);
    // d + rest = x - y without error.
    const float d = x - y, back = x - d;
    const float rest = (x - (d + back)) + (back - y);
    if (with_ratio) {
        const float v = fmaf(d, row.scale, row.v_high) + fmaf(rest, row.scale, row.v_low);
        inner = fmaf(row.kr, v, inner);
    }
    // Where p = 0 the bracket may be infinite: the product is 0.
    const float value = e == 0 ? 0 : e * inner;
    if (!with_forward) {
        return value;
    }
    const float w = fmaf(d, row.scale, row.w_high) + fmaf(rest, row.scale, row.w_low);
    const float p = row.kp * e;
    const float apart = fmaf(-row.kq, fast_exp2((y - row.my) * row.scale), p);
    return value + (fabsf(w) < kSmallRatio ? p * ratio_below_one(w) : apart);
}

template <bool with_ratio, bool with_forward, typename T>
__device__ void gradient_columns(const T* x, const T* y, T* out, int64_t num_valid,
                                 const GradientRow& row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int shift = misalignment(x);
    const bool y_vector = misalignment(y) == shift, out_vector = misalignment(out) == shift;
    const int64_t blocks = num_blocks(num_valid, shift);
    for (int64_t block = warp; block < blocks; block += kWarps) {
        float vx[kGroup], vy[kGroup], value[kGroup];
        load_group(x, block, shift, lane, num_valid, true, kPadding, vx);
        if (with_ratio || with_forward) {
            load_group(y, block, shift, lane, num_valid, y_vector, kPadding, vy);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const float teacher = with_ratio || with_forward ? vy[i] : 0;
            value[i] = gradient_of<with_ratio, with_forward>(vx[i], teacher, row);
        }
        store_group(out, block, shift, lane, num_valid, out_vector, value);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Logits logits, GradientInputs in, T* out, int64_t out_stride, int64_t width) {
    const int64_t t = blockIdx.x;
    const T* x = static_cast<const T*>(logits.student) + t * logits.student_stride;
    const T* y = static_cast<const T*>(logits.teacher) + t * logits.teacher_stride;
    T* to = out + t * out_stride;
    const GradientRow row = gradient_row(in.final_stats + t * kFinalSize,
                                         in.coefficients + t * kCoefficients, logits.temperature);
    const Held held = special_elements(logits, in, row, t, x, y);
    __syncthreads();
    // Not != 0: a NaN coefficient must reach the result.
    const bool ratio = !(row.kr == 0), forward = !(row.kp == 0 && row.kq == 0);
    if (ratio && forward) {
        gradient_columns<true, true>(x, y, to, logits.num_valid, row);
    } else if (ratio) {
        gradient_columns<true, false>(x, y, to, logits.num_valid, row);
    } else if (forward) {
        gradient_columns<false, true>(x, y, to, logits.num_valid, row);
    } else {
        gradient_columns<false, false>(x, y, to, logits.num_valid, row);
    }
    for (int64_t column = logits.num_valid + threadIdx.x; column < width; column += kThreads) {
        from_float(0.0f, to + column);
    }
    __syncthreads();
    for (int i = 0; i < held.count; ++i) {
        from_float(held.value[i], to + held.id[i]);
    }
}

}  // namespace

cudaError_t logits_gradient(const Logits& logits, const GradientInputs& in, void* out,
                            int64_t out_stride, int64_t width, int64_t num_tokens,
                            cudaStream_t stream) {
    if (num_tokens == 0) {
        return cudaSuccess;
    }
    const dim3 grid(static_cast<unsigned>(num_tokens));
    if (logits.dtype == Dtype::f32) {
        gradient_kernel<float><<<grid, kThreads, 0, stream>>>(logits, in, static_cast<float*>(out),
                                                              out_stride, width);
    } else {
        gradient_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(
            logits, in, static_cast<__nv_bfloat16*>(out), out_stride, width);
    }
    return cudaGetLastError();
}

}  // namespace megatron_vopd::cuda
