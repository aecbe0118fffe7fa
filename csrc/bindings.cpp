// The operators as torch sees them: schemas, checks, allocation; and build_info() for Python.
// Arithmetic lives in cpu/ and cuda/. Errors of arguments are ValueErrors that name the argument.
#include "bindings.h"

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "distill_stats.h"

namespace megatron_vopd {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_topk_cpu(const at::Tensor& student,
                                                              const at::Tensor& teacher,
                                                              const at::Tensor& lengths,
                                                              int64_t topk) {
    check_lists(student, teacher, lengths);
    const auto lengths_c = lengths.contiguous();
    const int64_t* counts = lengths_c.data_ptr<int64_t>();
    const int64_t num_ranks = student.size(0);
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
        TORCH_CHECK_VALUE(counts[rank] >= 0 && counts[rank] <= student.size(2), "lengths: rank ",
                          rank, " has ", counts[rank], " entries, the lists hold ",
                          student.size(2));
    }
    const int64_t available = std::accumulate(counts, counts + num_ranks, int64_t{0});
    TORCH_CHECK_VALUE(topk >= 1 && topk <= available, "topk: expected 1 <= topk <= ", available,
                      " (the entries of all ranks), got ", topk);
    const MergeTensors tensors(student, teacher, lengths_c, topk);
    const auto lists = tensors.lists();
    const auto merged = tensors.merged();
    at::parallel_for(0, lists.num_tokens, 64, [&](int64_t begin, int64_t end) {
        cpu::merge_topk(lists, merged, begin, end);
    });
    return tensors.results();
}

template <typename T, typename Storage>
cpu::Logits<T> raw_logits(const at::Tensor& student, const at::Tensor& teacher,
                          const at::Tensor& labels, int64_t num_valid, double temperature) {
    return {reinterpret_cast<const T*>(student.data_ptr<Storage>()),
            reinterpret_cast<const T*>(teacher.data_ptr<Storage>()),
            student.stride(0),
            teacher.stride(0),
            labels.data_ptr<int64_t>(),
            num_valid,
            temperature};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_stats_cpu(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& labels,
    int64_t num_valid, double temperature, int64_t topk) {
    check_logits(student, teacher, labels, num_valid, temperature);
    TORCH_CHECK_VALUE(topk >= 0 && num_valid >= 0, "topk: expected >= 0, got ", topk);
    const StatsTensors tensors(student, labels, std::min(topk, num_valid));
    const auto out = tensors.arguments();
    const auto kernels = cpu::row_kernels();
    at::parallel_for(0, student.size(0), 1, [&](int64_t begin, int64_t end) {
        if (student.scalar_type() == at::kFloat) {
            kernels.stats_f32(
                raw_logits<float, float>(student, teacher, labels, num_valid, temperature), out,
                begin, end);
        } else {
            kernels.stats_bf16(raw_logits<cpu::Bf16, at::BFloat16>(student, teacher, labels,
                                                                   num_valid, temperature),
                               out, begin, end);
        }
    });
    return tensors.results();
}

at::Tensor merge_stats_cpu(const at::Tensor& packed, double optimal_floor) {
    check_packed(packed);
    const int64_t num_ranks = packed.size(0), num_tokens = packed.size(1);
    auto out = at::empty({num_tokens, kFinalSize}, packed.options());
    const double* from = packed.data_ptr<double>();
    double* to = out.data_ptr<double>();
    at::parallel_for(0, num_tokens, 256, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            merge_and_finalize(from + t * kTupleSize, num_ranks, num_tokens * kTupleSize,
                               optimal_floor, to + t * kFinalSize);
        }
    });
    return out;
}

// Above this many bytes an output is written past the caches, which it would only flush.
constexpr int64_t kStreamBytes = 8 << 20;

void write_gradient(const GradientTensors& call, const at::Tensor& out) {
    call.check();
    const auto& student = call.student;
    const int64_t num_tokens = student.size(0), width = student.size(1);
    const auto in = call.arguments();
    const bool stream =
        !out.is_same(student) &&
        num_tokens * width * static_cast<int64_t>(out.element_size()) > kStreamBytes;
    const auto kernels = cpu::row_kernels();
    at::parallel_for(0, num_tokens, 1, [&](int64_t begin, int64_t end) {
        if (student.scalar_type() == at::kFloat) {
            kernels.gradient_f32(raw_logits<float, float>(student, call.teacher, call.labels,
                                                          call.num_valid, call.temperature),
                                 in, {out.data_ptr<float>(), out.stride(0), width, stream}, begin,
                                 end);
        } else {
            kernels.gradient_bf16(
                raw_logits<cpu::Bf16, at::BFloat16>(student, call.teacher, call.labels,
                                                    call.num_valid, call.temperature),
                in,
                {reinterpret_cast<cpu::Bf16*>(out.data_ptr<at::BFloat16>()), out.stride(0), width,
                 stream},
                begin, end);
        }
    });
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["isa"] = cpu::isa_name(cpu::current_isa());
    info["detected_isa"] = cpu::isa_name(cpu::detected_isa());
#ifdef MEGATRON_VOPD_CUDA_ARCHS
    info["cuda_archs"] = MEGATRON_VOPD_CUDA_ARCHS;
#else
    info["cuda_archs"] = "";
#endif
    info["compiler"] = "gcc " __VERSION__;
    return info;
}

void set_isa(const std::string& name) {
    for (const auto isa : {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512}) {
        if (name == cpu::isa_name(isa)) {
            TORCH_CHECK_VALUE(cpu::set_isa(isa), "name: this machine has no ", name,
                              "; its best is ", cpu::isa_name(cpu::detected_isa()));
            return;
        }
    }
    TORCH_CHECK_VALUE(false, "name: expected portable, avx2 or avx512, got ", name);
}

}  // namespace

TORCH_LIBRARY(megatron_vopd, library) {
    library.def(
        "merge_topk(Tensor student, Tensor teacher, Tensor lengths, int topk)"
        " -> (Tensor student, Tensor teacher, Tensor taken)");
    library.def(
        "local_stats(Tensor student, Tensor teacher, Tensor labels, int num_valid,"
        " float temperature, int topk) -> (Tensor packed, Tensor topk_student,"
        " Tensor topk_teacher, Tensor topk_ids)");
    library.def("merge_stats(Tensor packed, float optimal_floor) -> Tensor");
    library.def(
        "logits_gradient(Tensor student, Tensor teacher, Tensor labels, Tensor final,"
        " Tensor coefficients, int num_valid, float temperature, Tensor? topk_ids=None,"
        " Tensor? topk_taken=None, Tensor? topk_summary=None) -> Tensor");
    library.def(
        "logits_gradient_(Tensor(a!) student, Tensor teacher, Tensor labels, Tensor final,"
        " Tensor coefficients, int num_valid, float temperature, Tensor? topk_ids=None,"
        " Tensor? topk_taken=None, Tensor? topk_summary=None) -> ()");
    // CUDA only: where a product takes bfloat16 operands and adds in fp32.
    library.def(
        "logits_gradient_narrow_(Tensor student, Tensor(a!) teacher, Tensor labels, Tensor final,"
        " Tensor coefficients, int num_valid, float temperature, Tensor? topk_ids=None,"
        " Tensor? topk_taken=None, Tensor? topk_summary=None) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_vopd, CPU, library) {
    library.impl("local_stats", local_stats_cpu);
    library.impl("merge_stats", merge_stats_cpu);
    library.impl("merge_topk", merge_topk_cpu);
    library.impl("logits_gradient", logits_gradient<write_gradient>);
    library.impl("logits_gradient_", logits_gradient_inplace<write_gradient>);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.doc() = "Kernels of megatron_vopd; the operators are under torch.ops.megatron_vopd.";
    module.def("build_info", &build_info, "Instruction set, CUDA architectures and compiler.");
    module.def("set_isa", &set_isa, "Use this instruction set from now on (tests).");
}

}  // namespace megatron_vopd
