// The statistics of one row by one CTA. The scheme is that of cpu/row_stats.h with a thread in
// place of a vector lane: all threads start at the references of the first blocks; each thread sums
// kBatch groups of columns in fp32, checks the sums, and only where they left the safe range takes
// the groups again one by one, raises its own references or goes careful. At the end the threads
// move to common references and add in fp64, in a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace megatron_vopd::cuda {

constexpr int kSums = 9;
constexpr float kLimit = 1.0e4f;
// Groups of a thread between two checks of the range.
constexpr int kBatch = 2;
// Doubles of shared memory that row_stats takes.
constexpr int kScratch = kWarps * (kSums + 2);

struct ThreadState {
    float scale, rx, ry;
    bool close, careful;
    float total[kSums];  // S N U D F C Q E G in log2 units, F with the other sign

    __device__ void move_to(float x, float y) {
        rx = x;
        ry = y;
        close = are_close(x, y);
    }
};

// Adds one group to `sum`. direct: d^ is taken from x - y (close_reference in distill_stats.h).
template <bool direct, bool careful>
__device__ inline void add_columns(const ThreadState& s, const float (&x)[kGroup],
                                   const float (&y)[kGroup], float (&sum)[kSums]) {
    const float rd = s.ry - s.rx;
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
}

// Sums of `groups` groups into `sum`; false where they left the safe range.
template <bool careful, int groups>
__device__ inline bool group_sums(const ThreadState& s, const float (&x)[groups][kGroup],
                                  const float (&y)[groups][kGroup], float (&sum)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        sum[i] = 0;
    }
    if (s.close) {
#pragma unroll
        for (int g = 0; g < groups; ++g) {
            add_columns<true, careful>(s, x[g], y[g], sum);
        }
    } else {
#pragma unroll
        for (int g = 0; g < groups; ++g) {
            add_columns<false, careful>(s, x[g], y[g], sum);
        }
    }
    const float all = sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7] + sum[8];
    return sum[0] < kLimit && sum[1] < kLimit && all - all == 0;
}

// The sums of a thread in log2 units: the algebra of distill_stats.h has no unit of its own.
__device__ inline Tuple log2_tuple(const ThreadState& s) {
    return {s.rx,       s.ry,       s.total[0], s.total[1], s.total[2], s.total[3], -s.total[4],
            s.total[5], s.total[6], s.total[7], s.total[8], 0,          0};
}

__device__ inline Tuple shifted_log2(const Tuple& t, double m, double n) {
    return shifted_by(t, m, n, exp2(t.m - m), exp2(t.n - n));
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
    const Tuple t = shifted_log2(log2_tuple(s), hx, hy);
    const double moved[kSums] = {t.S, t.N, t.U, t.D, -t.F, t.C, t.Q, t.E, t.G};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        s.total[i] = static_cast<float>(moved[i]);
    }
    s.move_to(hx, hy);
    return true;
}

__device__ inline void add_to_total(ThreadState& s, const float (&sum)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        s.total[i] += sum[i];
    }
}

// One group on its own, with all that may be necessary for it.
__device__ inline void add_group(ThreadState& s, const float (&x)[1][kGroup],
                                 const float (&y)[1][kGroup]) {
    float sum[kSums];
    bool good = !s.careful && group_sums<false>(s, x, y, sum);
    if (!good) {
        const bool raised = raise_references(s, x[0], y[0]);
        good = !s.careful && raised && group_sums<false>(s, x, y, sum);
        if (!good) {
            s.careful = true;
            group_sums<true>(s, x, y, sum);
        }
    }
    add_to_total(s, sum);
}

// The largest x and y over the CTA, on every thread; NaN where one is NaN. `scratch`: 2 kWarps.
// The caller may not write the scratch again before a barrier.
__device__ inline void cta_max(float& x, float& y, float* scratch) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other_x = __shfl_xor_sync(0xffffffffu, x, offset);
        const float other_y = __shfl_xor_sync(0xffffffffu, y, offset);
        x = max_or_nan(x, other_x);
        y = max_or_nan(y, other_y);
    }
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
        scratch[kWarps + threadIdx.x / 32] = y;
    }
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        x = max_or_nan(x, scratch[warp]);
        y = max_or_nan(y, scratch[kWarps + warp]);
    }
}

// Sums of nine doubles over a warp by a butterfly that halves what each lane still adds: lane 4 i
// has the sum of part i in parts[0], and all lanes have that of the last one in parts[8].
__device__ inline void warp_sums(double (&parts)[kSums]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 16, half = 4; half > 0; offset /= 2, half /= 2) {
        const bool upper_half = (lane & offset) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const double given = upper_half ? parts[i] : parts[i + half];
            const double kept = upper_half ? parts[i + half] : parts[i];
            parts[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
        }
    }
    for (int offset = 2; offset > 0; offset /= 2) {
        parts[0] += __shfl_xor_sync(0xffffffffu, parts[0], offset);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        parts[8] += __shfl_xor_sync(0xffffffffu, parts[8], offset);
    }
}

// Merges the threads and writes the packed tuple of the row. `scratch`: kScratch, free.
__device__ inline void write_tuple(const ThreadState& s, double x_a, double y_a, double* scratch,
                                   double* packed) {
    float rx = s.rx, ry = s.ry;
    cta_max(rx, ry, reinterpret_cast<float*>(scratch));
    Tuple t = log2_tuple(s);
    if (rx != s.rx || ry != s.ry) {
        t = shifted_log2(t, rx, ry);
    }
    double parts[kSums] = {t.S, t.N, t.U, t.D, t.F, t.C, t.Q, t.E, t.G};
    warp_sums(parts);
    double* const by_warp = scratch + 2 * kWarps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
        by_warp[warp * kSums + lane / 4] = parts[0];
    }
    if (lane == 0) {
        by_warp[warp * kSums + 8] = parts[8];
    }
    __syncthreads();
    if (threadIdx.x < kSums) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) {
            total += by_warp[w * kSums + threadIdx.x];
        }
        // Powers of log2 units: none in S, N and C, two in Q, one in the others.
        const int sum = threadIdx.x;
        const int power = sum < 2 || sum == 5 ? 0 : sum == 6 ? 2 : 1;
        total *= power > 0 ? kLn2 : 1;
        packed[2 + sum] = power > 1 ? total * kLn2 : total;
    }
    if (threadIdx.x == 0) {
        packed[0] = rx * kLn2;
        packed[1] = ry * kLn2;
        packed[11] = x_a;
        packed[12] = y_a;
    }
}

// Stores the order key of a block's maximum. All lanes call it.
__device__ inline void write_key(int most, int block, int* block_keys) {
    most = __reduce_max_sync(0xffffffffu, most);
    if (threadIdx.x % 32 == 0) {
        block_keys[block] = most;
    }
}

// Blocks at an edge of the row, or of a row pair that lies differently on 16 bytes: one by one.
template <bool with_keys, typename T>
__device__ inline void add_block(ThreadState& s, const T* x, const T* y, const Blocks& blocks,
                                 bool y_vector, int block, int* block_keys) {
    const int lane = threadIdx.x % 32;
    float vx[1][kGroup], vy[1][kGroup];
    load_group(x, blocks, block, lane, true, kPadding, vx[0]);
    load_group(y, blocks, block, lane, y_vector, kPadding, vy[0]);
    if (with_keys) {
        int most = static_cast<int>(0x80000000);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int column = group_column<T>(block, blocks.shift, lane, i);
            // Padding may not beat a true -inf.
            if (column >= 0 && column < blocks.num_valid) {
                most = max(most, order_key(vx[0][i]));
            }
        }
        write_key(most, block, block_keys);
    }
    add_group(s, vx, vy);
}

// kBatch whole blocks, kWarps apart; x and y are at this lane's group of the first one.
template <bool with_keys, typename T>
__device__ inline void add_batch(ThreadState& s, const T* x, const T* y, int block,
                                 int* block_keys) {
    float vx[kBatch][kGroup], vy[kBatch][kGroup], sum[kSums];
#pragma unroll
    for (int g = 0; g < kBatch; ++g) {
        load_vectors(x + g * kWarps * kBlock, vx[g]);
        load_vectors(y + g * kWarps * kBlock, vy[g]);
    }
    if (with_keys) {
#pragma unroll
        for (int g = 0; g < kBatch; ++g) {
            float most = vx[g][0];
#pragma unroll
            for (int i = 1; i < kGroup; ++i) {
                most = max_or_nan(most, vx[g][i]);
            }
            write_key(order_key(most), block + g * kWarps, block_keys);
        }
    }
    if (group_sums<false>(s, vx, vy, sum) && !s.careful) {
        add_to_total(s, sum);
        return;
    }
    // Rare. Read again, so that the loop need not keep the groups.
#pragma unroll 1
    for (int g = 0; g < kBatch; ++g) {
        float one_x[1][kGroup], one_y[1][kGroup];
        load_vectors(x + g * kWarps * kBlock, one_x[0]);
        load_vectors(y + g * kWarps * kBlock, one_y[0]);
        add_group(s, one_x, one_y);
    }
}

// All threads call it. When it returns the keys are there, and the first kWarps doubles of the
// scratch (kScratch) are free; threads may still read the others.
// with_keys: block_keys (shared) gets the order key of each block's maximum.
template <bool with_keys, typename T>
__device__ void row_stats(const T* x, const T* y, const int64_t* label_at, const Blocks& blocks,
                          double temperature, int* block_keys, double* scratch, double* packed) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool y_vector = misalignment(y) == blocks.shift;
    ThreadState s;
    s.scale = static_cast<float>(1.4426950408889634 / temperature);
    s.careful = false;
    for (int i = 0; i < kSums; ++i) {
        s.total[i] = 0;
    }
    float first_x = kLowestReference, first_y = kLowestReference;
    if (warp < blocks.count) {
        float vx[kGroup], vy[kGroup];
        load_group(x, blocks, warp, lane, true, kPadding, vx);
        load_group(y, blocks, warp, lane, y_vector, kPadding, vy);
        for (int i = 0; i < kGroup; ++i) {
            first_x = fmaxf(first_x, vx[i] * s.scale);
            first_y = fmaxf(first_y, vy[i] * s.scale);
        }
    }
    // In the place of by_warp, which is written after another barrier.
    cta_max(first_x, first_y, reinterpret_cast<float*>(scratch + 2 * kWarps));
    s.move_to(first_x, close_reference(first_x, first_y));
    for (int block = warp; block < blocks.count; block += kBatch * kWarps) {
        const int last = block + (kBatch - 1) * kWarps;
        if (y_vector && blocks.whole(block, last)) {
            const int column = group_column<T>(block, blocks.shift, lane, 0);
            add_batch<with_keys>(s, x + column, y + column, block, block_keys);
        } else {
#pragma unroll 1
            for (int one = block; one <= last && one < blocks.count; one += kWarps) {
                add_block<with_keys>(s, x, y, blocks, y_vector, one, block_keys);
            }
        }
    }
    const int64_t label = *label_at;
    const bool owned = label >= 0 && label < blocks.num_valid;
    const double unit = static_cast<double>(s.scale) * kLn2;
    write_tuple(s, owned ? to_float(x[label]) * unit : 0.0, owned ? to_float(y[label]) * unit : 0.0,
                scratch, packed);
}

}  // namespace megatron_vopd::cuda
