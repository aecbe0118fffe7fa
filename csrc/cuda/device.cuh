// What the CUDA kernels share: conversions, order keys, and 16-byte loads of a row in blocks.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/launchers.h"
#include "distill_stats.h"

namespace megatron_vopd::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
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
// row, and the first and last ones are partly outside of [0, num_valid).
__device__ inline int64_t num_blocks(int64_t num_valid, int shift) {
    return (num_valid + shift + kBlock - 1) / kBlock;
}

// The column of element i of this lane's group: fp32 takes two vectors of 4, 128 columns apart,
// so that each load of the warp is contiguous; bf16 takes one vector of 8.
template <typename T>
__device__ inline int64_t group_column(int64_t block, int shift, int lane, int i) {
    const int64_t base = block * kBlock - shift;
    if constexpr (sizeof(T) == 4) {
        return base + (i / 4) * (kBlock / 2) + lane * 4 + i % 4;
    } else {
        return base + lane * kGroup + i;
    }
}

// This lane's group of a block as fp32, `padding` outside of the row. `vector`: the row has the
// alignment that `shift` stands for.
template <typename T>
__device__ inline void load_group(const T* row, int64_t block, int shift, int lane,
                                  int64_t num_valid, bool vector, float padding,
                                  float (&out)[kGroup]) {
    const bool inside = block * kBlock - shift >= 0 && (block + 1) * kBlock - shift <= num_valid;
    if (vector && inside) {
        if constexpr (sizeof(T) == 4) {
            const float4 a =
                *reinterpret_cast<const float4*>(row + group_column<T>(block, shift, lane, 0));
            const float4 b =
                *reinterpret_cast<const float4*>(row + group_column<T>(block, shift, lane, 4));
            out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
            out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
        } else {
            const uint4 raw =
                *reinterpret_cast<const uint4*>(row + group_column<T>(block, shift, lane, 0));
            const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[2 * i] = __uint_as_float(words[i] << 16);
                out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        const int64_t column = group_column<T>(block, shift, lane, i);
        out[i] = column >= 0 && column < num_valid ? to_float(row[column]) : padding;
    }
}

// Writes what load_group would read; columns outside of [0, num_valid) are left alone.
template <typename T>
__device__ inline void store_group(T* row, int64_t block, int shift, int lane, int64_t num_valid,
                                   bool vector, const float (&value)[kGroup]) {
    const bool inside = block * kBlock - shift >= 0 && (block + 1) * kBlock - shift <= num_valid;
    if (vector && inside) {
        if constexpr (sizeof(T) == 4) {
            float* to = row + group_column<T>(block, shift, lane, 0);
            *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
            *reinterpret_cast<float4*>(to + kBlock / 2) =
                make_float4(value[4], value[5], value[6], value[7]);
        } else {
            alignas(16) __nv_bfloat162 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                pairs[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
            }
            *reinterpret_cast<uint4*>(row + group_column<T>(block, shift, lane, 0)) =
                *reinterpret_cast<const uint4*>(pairs);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        const int64_t column = group_column<T>(block, shift, lane, i);
        if (column >= 0 && column < num_valid) {
            from_float(value[i], row + column);
        }
    }
}

}  // namespace megatron_vopd::cuda
