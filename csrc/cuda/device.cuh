// What the CUDA kernels share: conversions, order keys, and 16-byte loads of a row in blocks.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/launchers.h"
#include "distill_stats.h"

namespace megatron_vopd::cuda {

// Threads of a CTA, and CTAs per SM that the registers must leave room for: the registers of a
// thread times both are the occupancy. To be tried on a GPU, with benchmark_ops.py.
#ifndef MEGATRON_VOPD_THREADS
#define MEGATRON_VOPD_THREADS 256
#endif
#ifndef MEGATRON_VOPD_CTAS
#define MEGATRON_VOPD_CTAS 3
#endif
constexpr int kThreads = MEGATRON_VOPD_THREADS;
constexpr int kCtas = MEGATRON_VOPD_CTAS;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, one block");
static_assert(kThreads * kCtas * 64 <= 65536, "with fewer than 64 registers the loops would spill");
// References start here; padding is so far below that it has no mass at any temperature.
constexpr float kLowestReference = -1.0e30f;
constexpr float kPadding = -1.0e35f;
constexpr double kLn2 = 0.6931471805599453;
// Columns of one thread in one block: a warp covers a block of 256.
constexpr int kGroup = kBlock / 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(float value, float* to) { *to = value; }
__device__ inline void from_float(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }

__device__ inline float fast_exp2(float t) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(t));
    return out;
}

// The larger number; NaN where one of them is NaN.
__device__ inline float max_or_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Integers in the order of the floats; equal for equal numbers (-0.0 and +0.0); NaN above all.
__device__ inline int order_key(float value) {
    const float canonical = value + 0.0f;
    if (canonical != canonical) {
        return 0x7fffffff;
    }
    const int bits = __float_as_int(canonical);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// How many elements the row starts after a 16-byte boundary.
template <typename T>
__device__ inline int misalignment(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Blocks are laid on 16-byte boundaries: block b covers columns [b * kBlock - shift, ...) of the
// row. Those in [whole_begin, whole_end) are inside of [0, num_valid); at most the first and the
// last one are not.
struct Blocks {
    int num_valid, shift, count, whole_begin, whole_end;

    __device__ Blocks(int64_t valid, int row_shift)
        : num_valid(static_cast<int>(valid)),
          shift(row_shift),
          count((num_valid + shift + kBlock - 1) / kBlock),
          whole_begin(shift > 0),
          whole_end((num_valid + shift) / kBlock) {}

    __device__ bool whole(int first, int last) const {
        return first >= whole_begin && last < whole_end;
    }
};

// The column of element i of this lane's group: fp32 takes two vectors of 4, 128 columns apart,
// so that each load of the warp is contiguous; bf16 takes one vector of 8.
template <typename T>
__device__ inline int group_column(int block, int shift, int lane, int i) {
    const int base = block * kBlock - shift;
    if constexpr (sizeof(T) == 4) {
        return base + (i / 4) * (kBlock / 2) + lane * 4 + i % 4;
    } else {
        return base + lane * kGroup + i;
    }
}

// This lane's group as fp32, by vectors; `from` is the group's first element.
__device__ inline void load_vectors(const float* from, float (&out)[kGroup]) {
    const float4 a = *reinterpret_cast<const float4*>(from);
    const float4 b = *reinterpret_cast<const float4*>(from + kBlock / 2);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

__device__ inline void load_vectors(const __nv_bfloat16* from, float (&out)[kGroup]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// This lane's group of a block as fp32, `padding` outside of the row. `vector`: the row has the
// alignment that `shift` stands for.
template <typename T>
__device__ inline void load_group(const T* row, const Blocks& blocks, int block, int lane,
                                  bool vector, float padding, float (&out)[kGroup]) {
    if (vector && blocks.whole(block, block)) {
        load_vectors(row + group_column<T>(block, blocks.shift, lane, 0), out);
        return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        const int column = group_column<T>(block, blocks.shift, lane, i);
        out[i] = column >= 0 && column < blocks.num_valid ? to_float(row[column]) : padding;
    }
}

}  // namespace megatron_vopd::cuda
