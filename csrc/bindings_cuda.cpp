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

#include "bindings.h"
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

cuda::Dtype dtype_of(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat ? cuda::Dtype::f32 : cuda::Dtype::bf16;
}

cuda::Logits raw_logits(const at::Tensor& student, const at::Tensor& teacher,
                        const at::Tensor& labels, int64_t num_valid, double temperature) {
    check_device(teacher, "teacher", student);
    check_device(labels, "labels", student);
    TORCH_CHECK_VALUE(num_valid <= cuda::kMaxWidth, "num_valid: expected at most ", cuda::kMaxWidth,
                      " on CUDA, got ", num_valid);
    return {student.data_ptr(),         teacher.data_ptr(), student.stride(0), teacher.stride(0),
            labels.data_ptr<int64_t>(), num_valid,          temperature,       dtype_of(student)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_stats_cuda(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
    int64_t num_valid, double temperature, int64_t topk) {
    check_logits(student, teacher, labels, num_valid, temperature);
    const int64_t k = std::min(topk, num_valid);
    TORCH_CHECK_VALUE(topk >= 0 && k <= cuda::kMaxTopk, "topk: expected 0 to ", cuda::kMaxTopk,
                      " on CUDA, got ", topk);
    TORCH_CHECK_VALUE(topk == 0 || num_valid <= cuda::kMaxColumns, "student: a top-k takes up to ",
                      cuda::kMaxColumns, " columns per rank, got ", num_valid);
    const c10::cuda::CUDAGuard guard(student.device());
    const StatsTensors tensors(student, labels, k);
    C10_CUDA_CHECK(cuda::local_stats(raw_logits(student, teacher, labels, num_valid, temperature),
                                     tensors.arguments(), student.size(0),
                                     c10::cuda::getCurrentCUDAStream()));
    return tensors.results();
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
    const int64_t num_ranks = student.size(0);
    TORCH_CHECK_VALUE(num_ranks <= 32, "student: expected at most 32 ranks, got ", num_ranks);
    TORCH_CHECK_VALUE(topk >= 1 && topk <= num_ranks * student.size(2),
                      "topk: expected 1 <= topk <= ", num_ranks * student.size(2), ", got ", topk);
    const c10::cuda::CUDAGuard guard(student.device());
    const MergeTensors tensors(student, teacher, lengths, topk);
    C10_CUDA_CHECK(
        cuda::merge_topk(tensors.lists(), tensors.merged(), c10::cuda::getCurrentCUDAStream()));
    return tensors.results();
}

void write_gradient(const GradientTensors& call, const at::Tensor& out) {
    call.check();
    const auto& student = call.student;
    check_device(call.final_stats, "final", student);
    check_device(call.coefficients, "coefficients", student);
    if (call.topk_ids.has_value()) {
        TORCH_CHECK_VALUE(call.topk_ids->size(1) <= cuda::kMaxTopk, "topk_ids: expected at most ",
                          cuda::kMaxTopk, " columns on CUDA, got ", call.topk_ids->size(1));
        check_device(*call.topk_ids, "topk_ids", student);
        check_device(*call.topk_taken, "topk_taken", student);
        check_device(*call.topk_summary, "topk_summary", student);
    }
    const c10::cuda::CUDAGuard guard(student.device());
    C10_CUDA_CHECK(cuda::logits_gradient(
        raw_logits(student, call.teacher, call.labels, call.num_valid, call.temperature),
        call.arguments(), {out.data_ptr(), out.stride(0), out.size(1), dtype_of(out)},
        student.size(0), c10::cuda::getCurrentCUDAStream()));
}

// The gradient in bfloat16 over the teacher's fp32 logits, each row at the beginning of theirs.
void logits_gradient_narrow(const at::Tensor& student, at::Tensor& teacher,
                            const at::Tensor& labels, const at::Tensor& final_stats,
                            const at::Tensor& coefficients, int64_t num_valid, double temperature,
                            const std::optional<at::Tensor>& topk_ids,
                            const std::optional<at::Tensor>& topk_taken,
                            const std::optional<at::Tensor>& topk_summary) {
    TORCH_CHECK_VALUE(teacher.scalar_type() == at::kFloat && teacher.dim() == 2 &&
                          2 * teacher.size(1) >= student.size(-1) && !teacher.is_same(student),
                      "teacher: expected float32 [tokens, >= ", (student.size(-1) + 1) / 2,
                      "] in memory of its own, got ", teacher.scalar_type(), " ", teacher.sizes());
    write_gradient({student, teacher, labels, final_stats, coefficients, num_valid, temperature,
                    topk_ids, topk_taken, topk_summary},
                   teacher.view(at::kBFloat16).slice(1, 0, student.size(1)));
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_vopd, CUDA, library) {
    library.impl("local_stats", local_stats_cuda);
    library.impl("merge_stats", merge_stats_cuda);
    library.impl("merge_topk", merge_topk_cuda);
    library.impl("logits_gradient", logits_gradient<write_gradient>);
    library.impl("logits_gradient_", logits_gradient_inplace<write_gradient>);
    library.impl("logits_gradient_narrow_", logits_gradient_narrow);
}

}  // namespace megatron_vopd
