// The CUDA implementations of the operators that bindings.cpp declares: checks, allocation and the
// current stream; arithmetic is behind cuda/launchers.h. Built only with a CUDA torch.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda/launchers.h"
#include "distill_stats.h"

namespace megatron_vopd {
namespace {

// A kernel that is given another device's pointer corrupts memory or ends the CUDA context.
void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& student) {
    TORCH_CHECK_VALUE(tensor.device() == student.device(), name, ": expected on ", student.device(),
                      " as the student, got ", tensor.device());
}

cuda::Logits raw_logits(const at::Tensor& student, const at::Tensor& teacher,
                        const at::Tensor& labels, int64_t num_valid, double temperature) {
    check_device(teacher, "teacher", student);
    check_device(labels, "labels", student);
    const auto dtype = student.scalar_type() == at::kFloat ? cuda::Dtype::f32 : cuda::Dtype::bf16;
    return {student.data_ptr(),         teacher.data_ptr(), student.stride(0), teacher.stride(0),
            labels.data_ptr<int64_t>(), num_valid,          temperature,       dtype};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_stats_cuda(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
    int64_t num_valid, double temperature, int64_t topk) {
    check_logits(student, teacher, labels, num_valid, temperature);
    const int64_t num_tokens = student.size(0), k = std::min(topk, num_valid);
    TORCH_CHECK_VALUE(topk >= 0 && k <= cuda::kMaxTopk, "topk: expected 0 to ", cuda::kMaxTopk,
                      " on CUDA, got ", topk);
    TORCH_CHECK_VALUE(topk == 0 || num_valid <= cuda::kMaxColumns, "student: a top-k takes up to ",
                      cuda::kMaxColumns, " columns per rank, got ", num_valid);
    const c10::cuda::CUDAGuard guard(student.device());
    const auto floats = student.options().dtype(at::kFloat);
    auto packed = at::empty({num_tokens, kTupleSize}, student.options().dtype(at::kDouble));
    auto topk_student = at::empty({num_tokens, k}, floats);
    auto topk_teacher = at::empty({num_tokens, k}, floats);
    auto topk_ids = at::empty({num_tokens, k}, labels.options());
    const cuda::LocalStats out{packed.data_ptr<double>(), topk_student.data_ptr<float>(),
                               topk_teacher.data_ptr<float>(), topk_ids.data_ptr<int64_t>(), k};
    C10_CUDA_CHECK(cuda::local_stats(raw_logits(student, teacher, labels, num_valid, temperature),
                                     out, num_tokens, c10::cuda::getCurrentCUDAStream()));
    return {packed, topk_student, topk_teacher, topk_ids};
}

at::Tensor merge_stats_cuda(const at::Tensor& packed, double optimal_floor) {
    check_packed(packed);
    const c10::cuda::CUDAGuard guard(packed.device());
    auto out = at::empty({packed.size(1), kFinalSize}, packed.options());
    C10_CUDA_CHECK(cuda::merge_stats(packed.data_ptr<double>(), packed.size(0), packed.size(1),
                                     optimal_floor, out.data_ptr<double>(),
                                     c10::cuda::getCurrentCUDAStream()));
    return out;
}

// The lengths stay on the device: their range and sum are the caller's business here.
std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_topk_cuda(const at::Tensor& student,
                                                               const at::Tensor& teacher,
                                                               const at::Tensor& lengths,
                                                               int64_t topk) {
    check_lists(student, teacher, lengths);
    check_device(teacher, "teacher", student);
    check_device(lengths, "lengths", student);
    const int64_t num_ranks = student.size(0), num_tokens = student.size(1);
    TORCH_CHECK_VALUE(num_ranks <= 32, "student: expected at most 32 ranks, got ", num_ranks);
    TORCH_CHECK_VALUE(topk >= 1 && topk <= num_ranks * student.size(2),
                      "topk: expected 1 <= topk <= ", num_ranks * student.size(2), ", got ", topk);
    const c10::cuda::CUDAGuard guard(student.device());
    const auto student_c = student.contiguous(), teacher_c = teacher.contiguous();
    const auto lengths_c = lengths.contiguous();
    auto out_student = at::empty({num_tokens, topk}, student.options());
    auto out_teacher = at::empty({num_tokens, topk}, student.options());
    auto taken = at::empty({num_tokens, num_ranks}, lengths.options());
    C10_CUDA_CHECK(cuda::merge_topk(student_c.data_ptr<float>(), teacher_c.data_ptr<float>(),
                                    lengths_c.data_ptr<int64_t>(), num_ranks, num_tokens,
                                    student.size(2), topk, out_student.data_ptr<float>(),
                                    out_teacher.data_ptr<float>(), taken.data_ptr<int64_t>(),
                                    c10::cuda::getCurrentCUDAStream()));
    return {out_student, out_teacher, taken};
}

void gradient_into(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
                   const at::Tensor& final_stats, const at::Tensor& coefficients, int64_t num_valid,
                   double temperature, const std::optional<at::Tensor>& topk_ids,
                   const std::optional<at::Tensor>& topk_taken,
                   const std::optional<at::Tensor>& topk_summary, const at::Tensor& out) {
    check_logits(student, teacher, labels, num_valid, temperature);
    const int64_t num_tokens = student.size(0);
    check_gradient(num_tokens, final_stats, coefficients, topk_ids, topk_taken, topk_summary);
    check_device(final_stats, "final", student);
    check_device(coefficients, "coefficients", student);
    const c10::cuda::CUDAGuard guard(student.device());
    cuda::GradientInputs in{final_stats.data_ptr<double>(),
                            coefficients.data_ptr<double>(),
                            nullptr,
                            nullptr,
                            nullptr,
                            0};
    if (topk_ids.has_value()) {
        TORCH_CHECK_VALUE(topk_ids->size(1) <= cuda::kMaxTopk, "topk_ids: expected at most ",
                          cuda::kMaxTopk, " columns on CUDA, got ", topk_ids->size(1));
        check_device(*topk_ids, "topk_ids", student);
        check_device(*topk_taken, "topk_taken", student);
        check_device(*topk_summary, "topk_summary", student);
        in.topk_ids = topk_ids->data_ptr<int64_t>();
        in.topk_taken = topk_taken->data_ptr<int64_t>();
        in.topk_summary = topk_summary->data_ptr<double>();
        in.topk = topk_ids->size(1);
    }
    C10_CUDA_CHECK(cuda::logits_gradient(
        raw_logits(student, teacher, labels, num_valid, temperature), in, out.data_ptr(),
        out.stride(0), student.size(1), num_tokens, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor logits_gradient_cuda(const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& labels, const at::Tensor& final_stats,
                                const at::Tensor& coefficients, int64_t num_valid,
                                double temperature, const std::optional<at::Tensor>& topk_ids,
                                const std::optional<at::Tensor>& topk_taken,
                                const std::optional<at::Tensor>& topk_summary) {
    auto out = at::empty(student.sizes(), student.options());
    gradient_into(student, teacher, labels, final_stats, coefficients, num_valid, temperature,
                  topk_ids, topk_taken, topk_summary, out);
    return out;
}

void logits_gradient_inplace_cuda(at::Tensor& student, const at::Tensor& teacher,
                                  const at::Tensor& labels, const at::Tensor& final_stats,
                                  const at::Tensor& coefficients, int64_t num_valid,
                                  double temperature, const std::optional<at::Tensor>& topk_ids,
                                  const std::optional<at::Tensor>& topk_taken,
                                  const std::optional<at::Tensor>& topk_summary) {
    gradient_into(student, teacher, labels, final_stats, coefficients, num_valid, temperature,
                  topk_ids, topk_taken, topk_summary, student);
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_vopd, CUDA, library) {
    library.impl("local_stats", local_stats_cuda);
    library.impl("merge_stats", merge_stats_cuda);
    library.impl("merge_topk", merge_topk_cuda);
    library.impl("logits_gradient", logits_gradient_cuda);
    library.impl("logits_gradient_", logits_gradient_inplace_cuda);
}

}  // namespace megatron_vopd
