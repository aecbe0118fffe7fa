// What the CPU and the CUDA bindings have in common: the outputs allocated, the kernels' argument
// blocks filled in, and both gradient operators from one function.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "checks.h"
#include "distill_stats.h"

namespace megatron_vopd {

// The outputs of local_stats for the student's logits [tokens, V] and a top-k of `topk`.
struct StatsTensors {
    at::Tensor packed, topk_student, topk_teacher, topk_ids;

    StatsTensors(const at::Tensor& student, const at::Tensor& labels, int64_t topk) {
        const int64_t num_tokens = student.size(0);
        const auto floats = student.options().dtype(at::kFloat);
        packed = at::empty({num_tokens, kTupleSize}, student.options().dtype(at::kDouble));
        topk_student = at::empty({num_tokens, topk}, floats);
        topk_teacher = at::empty({num_tokens, topk}, floats);
        topk_ids = at::empty({num_tokens, topk}, labels.options());
    }

    LocalStats arguments() const {
        return {packed.data_ptr<double>(), topk_student.data_ptr<float>(),
                topk_teacher.data_ptr<float>(), topk_ids.data_ptr<int64_t>(), topk_ids.size(1)};
    }

    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> results() const {
        return {packed, topk_student, topk_teacher, topk_ids};
    }
};

// The inputs of merge_topk, contiguous, and its outputs.
struct MergeTensors {
    at::Tensor student, teacher, lengths, out_student, out_teacher, taken;

    MergeTensors(const at::Tensor& student_lists, const at::Tensor& teacher_lists,
                 const at::Tensor& list_lengths, int64_t topk)
        : student(student_lists.contiguous()),
          teacher(teacher_lists.contiguous()),
          lengths(list_lengths.contiguous()) {
        const int64_t num_ranks = student.size(0), num_tokens = student.size(1);
        out_student = at::empty({num_tokens, topk}, student.options());
        out_teacher = at::empty({num_tokens, topk}, student.options());
        taken = at::empty({num_tokens, num_ranks}, lengths.options());
    }

    TopkLists lists() const {
        return {student.data_ptr<float>(), teacher.data_ptr<float>(), lengths.data_ptr<int64_t>(),
                student.size(0),           student.size(1),           student.size(2)};
    }

    MergedTopk merged() const {
        return {out_student.data_ptr<float>(), out_teacher.data_ptr<float>(),
                taken.data_ptr<int64_t>(), out_student.size(1)};
    }

    std::tuple<at::Tensor, at::Tensor, at::Tensor> results() const {
        return {out_student, out_teacher, taken};
    }
};

// The arguments of both gradient operators.
struct GradientTensors {
    const at::Tensor& student;
    const at::Tensor& teacher;
    const at::Tensor& labels;
    const at::Tensor& final_stats;
    const at::Tensor& coefficients;
    int64_t num_valid;
    double temperature;
    const std::optional<at::Tensor>& topk_ids;
    const std::optional<at::Tensor>& topk_taken;
    const std::optional<at::Tensor>& topk_summary;

    void check() const {
        check_logits(student, teacher, labels, num_valid, temperature);
        check_gradient(student.size(0), final_stats, coefficients, topk_ids, topk_taken,
                       topk_summary);
    }

    GradientInputs arguments() const {
        GradientInputs in{final_stats.data_ptr<double>(),
                          coefficients.data_ptr<double>(),
                          nullptr,
                          nullptr,
                          nullptr,
                          0};
        if (topk_ids.has_value()) {
            in.topk_ids = topk_ids->data_ptr<int64_t>();
            in.topk_taken = topk_taken->data_ptr<int64_t>();
            in.topk_summary = topk_summary->data_ptr<double>();
            in.topk = topk_ids->size(1);
        }
        return in;
    }
};

using WriteGradient = void(const GradientTensors& call, const at::Tensor& out);

// The operator that returns the gradient.
template <WriteGradient* write>
at::Tensor logits_gradient(const at::Tensor& student, const at::Tensor& teacher,
                           const at::Tensor& labels, const at::Tensor& final_stats,
                           const at::Tensor& coefficients, int64_t num_valid, double temperature,
                           const std::optional<at::Tensor>& topk_ids,
                           const std::optional<at::Tensor>& topk_taken,
                           const std::optional<at::Tensor>& topk_summary) {
    auto out = at::empty(student.sizes(), student.options());
    write({student, teacher, labels, final_stats, coefficients, num_valid, temperature, topk_ids,
           topk_taken, topk_summary},
          out);
    return out;
}

// The operator that writes the gradient over the student's logits.
template <WriteGradient* write>
void logits_gradient_inplace(at::Tensor& student, const at::Tensor& teacher,
                             const at::Tensor& labels, const at::Tensor& final_stats,
                             const at::Tensor& coefficients, int64_t num_valid, double temperature,
                             const std::optional<at::Tensor>& topk_ids,
                             const std::optional<at::Tensor>& topk_taken,
                             const std::optional<at::Tensor>& topk_summary) {
    write({student, teacher, labels, final_stats, coefficients, num_valid, temperature, topk_ids,
           topk_taken, topk_summary},
          student);
}

}  // namespace megatron_vopd
