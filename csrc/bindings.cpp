// The operators as torch sees them: schemas, checks, allocation; and build_info() for Python.
// Arithmetic lives in cpu/ and cuda/. Errors of arguments are ValueErrors that name the argument.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <numeric>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace megatron_vopd {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_topk_cpu(const at::Tensor& student,
                                                              const at::Tensor& teacher,
                                                              const at::Tensor& lengths,
                                                              int64_t topk) {
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
    const auto student_c = student.contiguous();
    const auto teacher_c = teacher.contiguous();
    const auto lengths_c = lengths.contiguous();
    const int64_t* counts = lengths_c.data_ptr<int64_t>();
    const int64_t num_ranks = student.size(0), num_tokens = student.size(1);
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
        TORCH_CHECK_VALUE(counts[rank] >= 0 && counts[rank] <= student.size(2), "lengths: rank ",
                          rank, " has ", counts[rank], " entries, the lists hold ",
                          student.size(2));
    }
    const int64_t available = std::accumulate(counts, counts + num_ranks, int64_t{0});
    TORCH_CHECK_VALUE(topk >= 1 && topk <= available, "topk: expected 1 <= topk <= ", available,
                      " (the entries of all ranks), got ", topk);
    auto out_student = at::empty({num_tokens, topk}, student.options());
    auto out_teacher = at::empty({num_tokens, topk}, student.options());
    auto taken = at::empty({num_tokens, num_ranks}, lengths.options());
    const cpu::TopkLists lists{student_c.data_ptr<float>(),
                               teacher_c.data_ptr<float>(),
                               counts,
                               num_ranks,
                               num_tokens,
                               student.size(2)};
    const cpu::MergedTopk merged{out_student.data_ptr<float>(), out_teacher.data_ptr<float>(),
                                 taken.data_ptr<int64_t>(), topk};
    at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
        cpu::merge_topk(lists, merged, begin, end);
    });
    return {out_student, out_teacher, taken};
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
}

TORCH_LIBRARY_IMPL(megatron_vopd, CPU, library) { library.impl("merge_topk", merge_topk_cpu); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.doc() = "Kernels of megatron_vopd; the operators are under torch.ops.megatron_vopd.";
    module.def("build_info", &build_info, "Instruction set, CUDA architectures and compiler.");
    module.def("set_isa", &set_isa, "Use this instruction set from now on (tests).");
}

}  // namespace megatron_vopd
