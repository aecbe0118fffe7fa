// Raw-pointer entry points of the CPU kernels. No torch types: bindings.cpp checks and allocates.
// Every function works on tokens [begin, end), so that the caller decides how to spread them.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace megatron_vopd::cpu {

struct Bf16 {
    uint16_t bits;
};

// The logits of one shard, fp32 (float) or bf16 (Bf16). Only columns [0, num_valid) are read;
// labels are relative to the shard and belong to other ranks outside of that range.
template <typename T>
struct Logits {
    const T* student;
    const T* teacher;
    int64_t student_stride;
    int64_t teacher_stride;
    const int64_t* labels;
    int64_t num_valid;
    double temperature;
};

// width >= num_valid; surplus columns are written as 0. `stream`: bypass the caches (fresh output
// that is larger than they are).
template <typename T>
struct GradientOutput {
    T* data;
    int64_t stride;
    int64_t width;
    bool stream;
};

// One instruction set's row kernels.
struct RowKernels {
    void (*stats_f32)(const Logits<float>&, const LocalStats&, int64_t begin, int64_t end);
    void (*stats_bf16)(const Logits<Bf16>&, const LocalStats&, int64_t begin, int64_t end);
    void (*gradient_f32)(const Logits<float>&, const GradientInputs&, const GradientOutput<float>&,
                         int64_t begin, int64_t end);
    void (*gradient_bf16)(const Logits<Bf16>&, const GradientInputs&, const GradientOutput<Bf16>&,
                          int64_t begin, int64_t end);
};

RowKernels portable_kernels();
#if defined(__x86_64__)
RowKernels avx2_kernels();
RowKernels avx512_kernels();
#endif

// The kernels of current_isa().
RowKernels row_kernels();

// Stable k-way merge in rank order. Shards are contiguous, so rank order is id order and the result
// is the exact global answer. Requires sum(lengths) >= topk.
void merge_topk(const TopkLists& lists, const MergedTopk& merged, int64_t begin, int64_t end);

}  // namespace megatron_vopd::cpu
