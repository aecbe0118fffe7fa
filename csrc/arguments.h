// The argument blocks that CPU and CUDA kernels have in common. No torch types.
#pragma once

#include <cstdint>

namespace megatron_vopd {

// Outputs of the statistics: packed [tokens, 13]; the lists [tokens, topk], topk <= num_valid,
// possibly 0.
struct LocalStats {
    double* packed;
    float* topk_student;
    float* topk_teacher;
    int64_t* topk_ids;
    int64_t topk;
};

// What the gradient reads besides the logits. ids [tokens, topk], taken [tokens], summary
// [tokens, 6] are null without a top-k.
struct GradientInputs {
    const double* final_stats;
    const double* coefficients;
    const int64_t* topk_ids;
    const int64_t* topk_taken;
    const double* topk_summary;
    int64_t topk;
};

// Per-rank top-k lists, each sorted by (value descending, id ascending; NaN first), of shape
// [num_ranks, num_tokens, list_size]; only the first lengths[r] entries of rank r are read.
struct TopkLists {
    const float* student;
    const float* teacher;
    const int64_t* lengths;
    int64_t num_ranks;
    int64_t num_tokens;
    int64_t list_size;
};

// The global list [num_tokens, topk] and how many entries came from each rank [num_tokens,
// num_ranks].
struct MergedTopk {
    float* student;
    float* teacher;
    int64_t* taken;
    int64_t topk;
};

}  // namespace megatron_vopd
