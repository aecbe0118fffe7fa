// The statistics of one row by one CTA. The scheme is that of cpu/row_stats.h with a thread in
// place of a vector lane: all threads start at the references of the first blocks; each thread sums
// a group of columns in fp32, checks it, and only where it left the safe range raises its own
// references or goes careful. At the end the threads move to common references and add in fp64, in
// a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace megatron_vopd::cuda {

constexpr int kSums = 9;
constexpr float kLimit = 1.0e4f;

struct ThreadState {
    float scale, rx, ry;
    bool careful;
    float total[kSums];  // S N U D F C Q E G in log2 units
};

// Sums of one group into `sum`; false where they left the safe range.
__device__ inline bool group_sums(const ThreadState& s, bool careful, const float (&x)[kGroup],
                                  const float (&y)[kGroup], float (&sum)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        sum[i] = 0;
    }
    const float rd = s.ry - s.rx;
    const bool direct = are_close(s.rx, s.ry);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        float tx = fmaf(x[i], s.scale, -s.rx), ty = fmaf(y[i], s.scale, -s.ry);
        const float e = fast_exp2(tx), f = fast_exp2(ty);
        float d = direct ? fmaf(x[i] - y[i], s.scale, rd) : tx - ty, dq = d;
        if (careful) {
            dq = f == 0 ? 0 : d;
            d = e == 0 ? 0 : d;
            tx = e == 0 ? 0 : tx;
            ty = f == 0 ? 0 : ty;
        }
        const float w = e * d;
        sum[0] += e;
        sum[1] += f;
        sum[2] = fmaf(e, tx, sum[2]);
        sum[3] += w;
        sum[4] = fmaf(f, dq, sum[4]);
        sum[5] = fmaf(e, e, sum[5]);
        sum[6] = fmaf(w, d, sum[6]);
        sum[7] = fmaf(e, w, sum[7]);
        sum[8] = fmaf(f, ty, sum[8]);
    }
    const float all = sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7] + sum[8];
    return sum[0] < kLimit && sum[1] < kLimit && all - all == 0;
}

__device__ inline Tuple natural_tuple(const ThreadState& s) {
    return {s.rx * kLn2,
            s.ry * kLn2,
            s.total[0],
            s.total[1],
            s.total[2] * kLn2,
            s.total[3] * kLn2,
            -s.total[4] * kLn2,
            s.total[5],
            s.total[6] * kLn2 * kLn2,
            s.total[7] * kLn2,
            s.total[8] * kLn2,
            0,
            0};
}

__device__ inline bool raise_references(ThreadState& s, const float (&x)[kGroup],
                                        const float (&y)[kGroup]) {
    float hx = kLowestReference, hy = kLowestReference;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        hx = fmaxf(hx, x[i] * s.scale);
        hy = fmaxf(hy, y[i] * s.scale);
    }
    hx = fmaxf(hx, s.rx);
    hy = close_reference(hx, fmaxf(hy, s.ry));
    if (hx == s.rx && hy == s.ry) {
        return false;
    }
    const Tuple t = shifted(natural_tuple(s), hx * kLn2, hy * kLn2);
    const double moved[kSums] = {t.S,         t.N, t.U / kLn2,          t.D / kLn2,
                                 -t.F / kLn2, t.C, t.Q / (kLn2 * kLn2), t.E / kLn2,
                                 t.G / kLn2};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        s.total[i] = static_cast<float>(moved[i]);
    }
    s.rx = hx;
    s.ry = hy;
    return true;
}

__device__ inline void add_group(ThreadState& s, const float (&x)[kGroup],
                                 const float (&y)[kGroup]) {
    float sum[kSums];
    bool good = !s.careful && group_sums(s, false, x, y, sum);
    if (!good) {
        const bool raised = raise_references(s, x, y);
        good = !s.careful && raised && group_sums(s, false, x, y, sum);
        if (!good) {
            s.careful = true;
            group_sums(s, true, x, y, sum);
        }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        s.total[i] += sum[i];
    }
}

// Sum of one double per thread over the CTA, in a fixed order, on thread 0. `scratch`: kWarps.
__device__ inline double cta_sum(double value, double* scratch) {
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_down_sync(0xffffffffu, value, offset);
    }
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = value;
    }
    __syncthreads();
    double total = 0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < kWarps; ++warp) {
            total += scratch[warp];
        }
    }
    __syncthreads();
    return total;
}

// Largest value over the CTA, on every thread; NaN where one is NaN.
__device__ inline float cta_max(float value, float* scratch) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = (other != other || other > value) ? other : value;
    }
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = value;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
        const float other = scratch[warp];
        value = (other != other || other > value) ? other : value;
    }
    __syncthreads();
    return value;
}

// Merges the threads and writes the packed tuple of the row.
__device__ inline void write_tuple(const ThreadState& s, double x_a, double y_a, double* scratch,
                                   double* packed) {
    float* const floats = reinterpret_cast<float*>(scratch);
    const float rx = cta_max(s.rx, floats), ry = cta_max(s.ry, floats);
    Tuple t = natural_tuple(s);
    if (rx != s.rx || ry != s.ry) {
        t = shifted(t, rx * kLn2, ry * kLn2);
    }
    const double parts[kSums] = {t.S, t.N, t.U, t.D, t.F, t.C, t.Q, t.E, t.G};
    for (int i = 0; i < kSums; ++i) {
        const double total = cta_sum(parts[i], scratch);
        if (threadIdx.x == 0) {
            packed[2 + i] = total;
        }
    }
    if (threadIdx.x == 0) {
        packed[0] = rx * kLn2;
        packed[1] = ry * kLn2;
        packed[11] = x_a;
        packed[12] = y_a;
    }
}

// All threads call it. block_keys (shared): the order key of each block's maximum, or null.
template <typename T>
__device__ void row_stats(const T* x, const T* y, int64_t label, int64_t num_valid,
                          double temperature, int* block_keys, double* scratch, double* packed) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int shift = misalignment(x);
    const bool y_vector = misalignment(y) == shift;
    const int64_t blocks = num_blocks(num_valid, shift);
    ThreadState s;
    s.scale = static_cast<float>(1.4426950408889634 / temperature);
    s.careful = false;
    for (int i = 0; i < kSums; ++i) {
        s.total[i] = 0;
    }
    float vx[kGroup], vy[kGroup];
    float first_x = kLowestReference, first_y = kLowestReference;
    if (warp < blocks) {
        load_group(x, warp, shift, lane, num_valid, true, kPadding, vx);
        load_group(y, warp, shift, lane, num_valid, y_vector, kPadding, vy);
        for (int i = 0; i < kGroup; ++i) {
            first_x = fmaxf(first_x, vx[i] * s.scale);
            first_y = fmaxf(first_y, vy[i] * s.scale);
        }
    }
    s.rx = cta_max(first_x, reinterpret_cast<float*>(scratch));
    s.ry = close_reference(s.rx, cta_max(first_y, reinterpret_cast<float*>(scratch)));
    for (int64_t block = warp; block < blocks; block += kWarps) {
        load_group(x, block, shift, lane, num_valid, true, kPadding, vx);
        load_group(y, block, shift, lane, num_valid, y_vector, kPadding, vy);
        if (block_keys != nullptr) {
            int most = static_cast<int>(0x80000000);
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const int64_t column = group_column<T>(block, shift, lane, i);
                // Padding may not beat a true -inf.
                if (column >= 0 && column < num_valid) {
                    most = max(most, order_key(vx[i]));
                }
            }
            most = __reduce_max_sync(0xffffffffu, most);
            if (lane == 0) {
                block_keys[block] = most;
            }
        }
        add_group(s, vx, vy);
    }
    const bool owned = label >= 0 && label < num_valid;
    const double unit = static_cast<double>(s.scale) * kLn2;
    write_tuple(s, owned ? to_float(x[label]) * unit : 0.0, owned ? to_float(y[label]) * unit : 0.0,
                scratch, packed);
    __syncthreads();
}

}  // namespace megatron_vopd::cuda
