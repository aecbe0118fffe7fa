// The gradient at a shard's student logits: one CTA per token. The formula and its constants are
// gradient_row() in distill_stats.h. The label and the top-k entries are computed in double before
// the row is written (over the student's row, or in bf16 over the teacher's) and stored after it.
#include "cuda/device.cuh"

namespace megatron_vopd::cuda {
namespace {

// Elements of the row that are computed before it is written and stored after it (shared memory).
struct Held {
    float listed[kMaxTopk];
    float label;
    bool label_is_listed;
};

// `listed[slot]` of the first `taken` entries of the list, and the label.
template <typename T>
__device__ void hold_elements(const Logits& logits, const GradientInputs& in,
                              const GradientRow& row, int64_t t, int64_t taken, const T* x,
                              const T* y, Held& held) {
    const double* f = in.final_stats + t * kFinalSize;
    const double* c = in.coefficients + t * kCoefficients;
    const int64_t label = logits.labels[t];
    bool listed = false;
    for (int64_t slot = threadIdx.x; slot < taken; slot += kThreads) {
        const int64_t id = in.topk_ids[t * in.topk + slot];
        const double xv = to_float(x[id]), yv = to_float(y[id]);
        const double value =
            gradient_element(xv, yv, id == label, f, c, row) +
            topk_element(xv, yv, in.topk_summary + t * kTopkSummary, c[4], logits.temperature);
        held.listed[slot] = static_cast<float>(value);
        listed = listed || id == label;
    }
    // The label unless the list has it: then its entry above is the whole value.
    listed = __syncthreads_or(listed);
    if (threadIdx.x == 0) {
        held.label_is_listed = listed;
        if (label >= 0 && label < logits.num_valid && !listed) {
            held.label = static_cast<float>(
                gradient_element(to_float(x[label]), to_float(y[label]), true, f, c, row));
        }
    }
}

template <typename Out>
__device__ void store_elements(const Logits& logits, const GradientInputs& in, int64_t t,
                               int64_t taken, const Held& held, Out* out) {
    for (int64_t slot = threadIdx.x; slot < taken; slot += kThreads) {
        from_float(held.listed[slot], out + in.topk_ids[t * in.topk + slot]);
    }
    const int64_t label = logits.labels[t];
    if (threadIdx.x == 0 && label >= 0 && label < logits.num_valid && !held.label_is_listed) {
        from_float(held.label, out + label);
    }
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

__device__ inline uint32_t bf16_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// This lane's group of a whole block, by vectors; `to` is the group's first element. A gradient in
// bf16 of fp32 logits takes their layout: two vectors of 4.
template <typename T>
__device__ inline void store_vectors(float* to, const float (&value)[kGroup]) {
    *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
    *reinterpret_cast<float4*>(to + kBlock / 2) =
        make_float4(value[4], value[5], value[6], value[7]);
}

template <typename T>
__device__ inline void store_vectors(__nv_bfloat16* to, const float (&value)[kGroup]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = bf16_pair(value[2 * i], value[2 * i + 1]);
    }
    if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        *reinterpret_cast<uint2*>(to + kBlock / 2) = make_uint2(words[2], words[3]);
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Bytes on whose multiples the groups of `out` must begin for store_vectors.
template <typename T, typename Out>
__device__ inline bool vectors_fit(const Out* out, int shift) {
    constexpr int bytes = sizeof(Out) < sizeof(T) ? 8 : 16;
    return (reinterpret_cast<uintptr_t>(out) - shift * sizeof(Out)) % bytes == 0;
}

// Writes the columns of one row. over_teacher: `out` is the beginning of y's own memory, in an
// element of half the size. A block then lies where y's block of half its number was, so all warps
// must have read that one. They have if all have read turn j before any writes turn j, for
// j = 0, 1, 3, 7, ...: what turn i writes over was read in turn (i + 1) / 2 or earlier.
template <bool with_ratio, bool with_forward, bool over_teacher, typename T, typename Out>
__device__ void gradient_columns(const T* x, const T* y, Out* out, const Blocks& blocks,
                                 const GradientRow& row) {
    constexpr bool with_teacher = with_ratio || with_forward;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, shift = blocks.shift;
    const bool y_vector = misalignment(y) == shift;
    const bool vector = (!with_teacher || y_vector) && vectors_fit<T>(out, shift);
    for (int turn = 0; turn * kWarps < blocks.count; ++turn) {
        const int block = turn * kWarps + warp;
        const bool whole = vector && blocks.whole(block, block);
        const int column = group_column<T>(block, shift, lane, 0);
        float vx[kGroup], vy[kGroup], value[kGroup];
        if (whole) {
            load_vectors(x + column, vx);
            if (with_teacher) {
                load_vectors(y + column, vy);
            }
        } else if (block < blocks.count) {
            load_group(x, blocks, block, lane, true, kPadding, vx);
            if (with_teacher) {
                load_group(y, blocks, block, lane, y_vector, kPadding, vy);
            }
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            value[i] = gradient_of<with_ratio, with_forward>(vx[i], with_teacher ? vy[i] : 0, row);
        }
        if (over_teacher && with_teacher && (turn & (turn + 1)) == 0) {
            __syncthreads();
        }
        if (whole) {
            store_vectors<T>(out + column, value);
        } else if (block < blocks.count) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const int at = group_column<T>(block, shift, lane, i);
                if (at >= 0 && at < blocks.num_valid) {
                    from_float(value[i], out + at);
                }
            }
        }
    }
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, kCtas)
    gradient_kernel(Logits logits, GradientInputs in, Out* out, int64_t out_stride, int64_t width) {
    constexpr bool over_teacher = sizeof(Out) < sizeof(T);
    __shared__ Held held;
    const int64_t t = blockIdx.x;
    const T* x = static_cast<const T*>(logits.student) + t * logits.student_stride;
    const T* y = static_cast<const T*>(logits.teacher) + t * logits.teacher_stride;
    Out* to = out + t * out_stride;
    const double* coefficients = in.coefficients + t * kCoefficients;
    const GradientRow row =
        gradient_row(in.final_stats + t * kFinalSize, coefficients, logits.temperature);
    const bool with_list = in.topk > 0 && coefficients[4] != 0;
    const int64_t taken = with_list ? in.topk_taken[t] : 0;
    hold_elements(logits, in, row, t, taken, x, y, held);
    __syncthreads();
    const Blocks blocks(logits.num_valid, misalignment(x));
    // Not != 0: a NaN coefficient must reach the result.
    const bool ratio = !(row.kr == 0), forward = !(row.kp == 0 && row.kq == 0);
    if (ratio && forward) {
        gradient_columns<true, true, over_teacher>(x, y, to, blocks, row);
    } else if (ratio) {
        gradient_columns<true, false, over_teacher>(x, y, to, blocks, row);
    } else if (forward) {
        gradient_columns<false, true, over_teacher>(x, y, to, blocks, row);
    } else {
        gradient_columns<false, false, over_teacher>(x, y, to, blocks, row);
    }
    __syncthreads();
    for (int64_t column = logits.num_valid + threadIdx.x; column < width; column += kThreads) {
        from_float(0.0f, to + column);
    }
    store_elements(logits, in, t, taken, held, to);
}

template <typename T, typename Out>
void launch_gradient(const Logits& logits, const GradientInputs& in, const GradientOutput& out,
                     int64_t num_tokens, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(num_tokens));
    gradient_kernel<T, Out><<<grid, kThreads, 0, stream>>>(logits, in, static_cast<Out*>(out.data),
                                                           out.stride, out.width);
}

}  // namespace

cudaError_t logits_gradient(const Logits& logits, const GradientInputs& in,
                            const GradientOutput& out, int64_t num_tokens, cudaStream_t stream) {
    if (num_tokens == 0) {
        return cudaSuccess;
    }
    if (logits.dtype == Dtype::bf16) {
        launch_gradient<__nv_bfloat16, __nv_bfloat16>(logits, in, out, num_tokens, stream);
    } else if (out.dtype == Dtype::f32) {
        launch_gradient<float, float>(logits, in, out, num_tokens, stream);
    } else {
        launch_gradient<float, __nv_bfloat16>(logits, in, out, num_tokens, stream);
    }
    return cudaGetLastError();
}

}  // namespace megatron_vopd::cuda
