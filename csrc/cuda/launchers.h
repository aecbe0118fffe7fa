// Raw-pointer entry points of the CUDA kernels: no torch types, so nvcc alone compiles them.
// Every launcher returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arguments.h"

namespace megatron_vopd::cuda {

enum class Dtype { f32, bf16 };

// One shard's logits: element pointers as void*, strides in elements.
struct Logits {
    const void* student;
    const void* teacher;
    int64_t student_stride;
    int64_t teacher_stride;
    const int64_t* labels;
    int64_t num_valid;
    double temperature;
    Dtype dtype;
};

// Columns per block maximum, and the largest shard whose maxima fit into shared memory.
constexpr int kBlock = 256;
constexpr int64_t kMaxColumns = int64_t{3700} * kBlock;
constexpr int64_t kMaxTopk = 1024;
// Columns of a row are counted in 32 bits.
constexpr int64_t kMaxWidth = int64_t{1} << 30;

cudaError_t local_stats(const Logits& logits, const LocalStats& out, int64_t num_tokens,
                        cudaStream_t stream);

cudaError_t merge_stats(const double* packed, int64_t num_ranks, int64_t num_tokens,
                        double optimal_floor, double* out, cudaStream_t stream);

cudaError_t merge_topk(const TopkLists& lists, const MergedTopk& merged, cudaStream_t stream);

// Rows of `width` elements, `stride` apart. The data may be the student's logits themselves, or,
// in bf16 of fp32 logits, the memory of the teacher's: then each row begins where theirs does.
struct GradientOutput {
    void* data;
    int64_t stride;
    int64_t width;
    Dtype dtype;
};

cudaError_t logits_gradient(const Logits& logits, const GradientInputs& in,
                            const GradientOutput& out, int64_t num_tokens, cudaStream_t stream);

}  // namespace megatron_vopd::cuda
