// Checks of the operators' arguments, shared by the CPU and CUDA bindings. An error is a ValueError
// whose message begins with the argument's name.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "distill_stats.h"

namespace megatron_vopd {

// Both logits of a call, checked alike by the statistics and the gradient.
inline void check_logits(const at::Tensor& student, const at::Tensor& teacher,
                         const at::Tensor& labels, int64_t num_valid, double temperature) {
    TORCH_CHECK_VALUE(
        student.dim() == 2 && student.size(1) >= num_valid && student.stride(1) == 1 &&
            (student.scalar_type() == at::kFloat || student.scalar_type() == at::kBFloat16),
        "student: expected float32 or bfloat16 [tokens, >= ", num_valid,
        "] with unit column stride, got ", student.scalar_type(), " ", student.sizes());
    TORCH_CHECK_VALUE(
        teacher.dim() == 2 && teacher.size(0) == student.size(0) && teacher.size(1) >= num_valid &&
            teacher.stride(1) == 1 && teacher.scalar_type() == student.scalar_type(),
        "teacher: expected ", student.scalar_type(), " [", student.size(0), ", >= ", num_valid,
        "] with unit column stride, got ", teacher.scalar_type(), " ", teacher.sizes());
    TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.dim() == 1 &&
                          labels.size(0) == student.size(0) && labels.is_contiguous(),
                      "labels: expected contiguous int64 [", student.size(0), "], got ",
                      labels.scalar_type(), " ", labels.sizes());
    TORCH_CHECK_VALUE(num_valid >= 0, "num_valid: expected >= 0, got ", num_valid);
    TORCH_CHECK_VALUE(temperature > 0, "temperature: expected > 0, got ", temperature);
}

// Per-rank lists of the top-k merge.
inline void check_lists(const at::Tensor& student, const at::Tensor& teacher,
                        const at::Tensor& lengths) {
    TORCH_CHECK_VALUE(student.dim() == 3 && student.scalar_type() == at::kFloat,
                      "student: expected float32 [ranks, tokens, k], got ", student.scalar_type(),
                      " ", student.sizes());
    TORCH_CHECK_VALUE(teacher.sizes() == student.sizes() && teacher.scalar_type() == at::kFloat,
                      "teacher: expected float32 ", student.sizes(), ", got ",
                      teacher.scalar_type(), " ", teacher.sizes());
    TORCH_CHECK_VALUE(lengths.scalar_type() == at::kLong && lengths.dim() == 1 &&
                          lengths.size(0) == student.size(0),
                      "lengths: expected int64 [", student.size(0), "], got ",
                      lengths.scalar_type(), " ", lengths.sizes());
}

// Stacked tuples of all ranks.
inline void check_packed(const at::Tensor& packed) {
    TORCH_CHECK_VALUE(packed.dim() == 3 && packed.size(2) == kTupleSize && packed.size(0) >= 1 &&
                          packed.scalar_type() == at::kDouble && packed.is_contiguous(),
                      "packed: expected contiguous float64 [ranks, tokens, 13], got ",
                      packed.scalar_type(), " ", packed.sizes());
}

// `width` columns, or a vector when it is negative.
inline void check_rows(const at::Tensor& tensor, const char* name, int64_t num_tokens,
                       int64_t width, at::ScalarType dtype) {
    const bool shaped =
        width < 0 ? tensor.dim() == 1 : tensor.dim() == 2 && tensor.size(1) == width;
    TORCH_CHECK_VALUE(shaped && tensor.size(0) == num_tokens && tensor.scalar_type() == dtype &&
                          tensor.is_contiguous(),
                      name, ": expected contiguous ", dtype, " with ", num_tokens, " rows, got ",
                      tensor.scalar_type(), " ", tensor.sizes());
}

// What the gradient reads besides the logits.
inline void check_gradient(int64_t num_tokens, const at::Tensor& final_stats,
                           const at::Tensor& coefficients,
                           const std::optional<at::Tensor>& topk_ids,
                           const std::optional<at::Tensor>& topk_taken,
                           const std::optional<at::Tensor>& topk_summary) {
    check_rows(final_stats, "final", num_tokens, kFinalSize, at::kDouble);
    check_rows(coefficients, "coefficients", num_tokens, kCoefficients, at::kDouble);
    if (topk_ids.has_value()) {
        TORCH_CHECK_VALUE(topk_taken.has_value() && topk_summary.has_value(),
                          "topk_ids: needs topk_taken and topk_summary too");
        check_rows(*topk_ids, "topk_ids", num_tokens, topk_ids->size(-1), at::kLong);
        check_rows(*topk_taken, "topk_taken", num_tokens, -1, at::kLong);
        check_rows(*topk_summary, "topk_summary", num_tokens, kTopkSummary, at::kDouble);
    }
}

}  // namespace megatron_vopd
