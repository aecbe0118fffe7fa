"""The CUDA launchers as functions over CPU tensors: the sources compiled by g++ (emulation/).

Only what g++ cannot read is rewritten: launches, dynamic shared memory, and two instructions. A
block has two warps: the same paths, fewer fibers.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.ops.native import Kernels
from megatron_vopd.ops.reference import narrow_rows

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
EXPORTS = """
using namespace megatron_vopd;
using namespace megatron_vopd::cuda;
extern "C" void emulated_order(uint32_t seed) { emulation::shuffle_seed = seed; }
extern "C" void emulated_stats(const Logits& a, const LocalStats& b, int64_t n) {
    local_stats(a, b, n, nullptr);
}
extern "C" void emulated_merge(const double* p, int64_t r, int64_t n, double floor, double* out) {
    merge_stats(p, r, n, floor, out, nullptr);
}
extern "C" void emulated_topk(const TopkLists& lists, const MergedTopk& merged) {
    merge_topk(lists, merged, nullptr);
}
extern "C" void emulated_gradient(const Logits& a, const GradientInputs& b,
                                  const GradientOutput& out, int64_t n) {
    logits_gradient(a, b, out, n, nullptr);
}
"""


def translated(text: str) -> str:
    """Return CUDA source as C++ for the emulation."""
    launch = r"([\w:]+(?:<[\w, ]+>)?)<<<(.*?)>>>\((.*?)\);"
    text = re.sub(launch, r"emulation::launch(\2, [=] { \1(\3); });", text, flags=re.DOTALL)
    shared = r"extern __shared__ ([\w ]+?) (\w+)\[\];"
    text = re.sub(shared, r"\1* \2 = emulation::dynamic_shared<\1>();", text)
    flush = "out = t < -126.0f ? 0.0f : std::exp2(t);"
    text = re.sub(r'asm\("ex2.*?\);', flush, text)
    greater = "out = a != a || b != b ? NAN : std::fmax(a, b);"
    return re.sub(r'asm\("max.NaN.*?\);', greater, text)


def build(folder: Path) -> ctypes.CDLL:
    """Build the emulated kernels in `folder`."""
    for source in (*CSRC.glob("cuda/*"), *CSRC.glob("*.h")):
        target = folder / source.relative_to(CSRC)
        target.parent.mkdir(exist_ok=True)
        target.write_text(translated(source.read_text()))
    includes = "".join(f'#include "cuda/{name}.cu"\n' for name in ("stats", "merge", "gradient"))
    (folder / "all.cpp").write_text(includes + EXPORTS)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}"]
    command += ["-DMEGATRON_VOPD_THREADS=64"]
    command += [f"-I{HERE / 'emulation'}", str(folder / "all.cpp"), "-o", str(folder / "all.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "all.so"))


@contextmanager
def shuffled(library: ctypes.CDLL, seed: int) -> Iterator[None]:
    """Let threads run in another order each time between two barriers; the order is the seed's."""
    library.emulated_order(ctypes.c_uint32(seed))
    yield
    library.emulated_order(ctypes.c_uint32(0))


def _struct(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields)})


# The numbers of `cuda::Dtype`.
DTYPES = (torch.float32, torch.bfloat16)
POINTER, LONG, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
LOGITS = _struct(
    ("student", POINTER),
    ("teacher", POINTER),
    ("student_stride", LONG),
    ("teacher_stride", LONG),
    ("labels", POINTER),
    ("num_valid", LONG),
    ("temperature", DOUBLE),
    ("dtype", ctypes.c_int),
)
OUTPUTS = _struct(*((name, POINTER) for name in ("packed", "x", "y", "ids")), ("topk", LONG))
LISTS = _struct(
    *((name, POINTER) for name in ("student", "teacher", "lengths")),
    *((name, LONG) for name in ("num_ranks", "num_tokens", "list_size")),
)
MERGED = _struct(*((name, POINTER) for name in ("student", "teacher", "taken")), ("topk", LONG))
INPUTS = _struct(*((n, POINTER) for n in ("final", "c", "ids", "taken", "s")), ("topk", LONG))
OUTPUT = _struct(("data", POINTER), ("stride", LONG), ("width", LONG), ("dtype", ctypes.c_int))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return POINTER(None if tensor is None else tensor.data_ptr())


def kernels(library: ctypes.CDLL) -> Kernels:
    """Return functions with the operators' signatures over the emulated launchers."""

    def logits_of(x: Tensor, y: Tensor, labels: Tensor, num_valid: int, temperature: float) -> Any:
        strides = (x.stride(0), y.stride(0))
        dtype = DTYPES.index(x.dtype)
        return LOGITS(
            x.data_ptr(), y.data_ptr(), *strides, labels.data_ptr(), num_valid, temperature, dtype
        )

    def local_stats(x, y, labels, num_valid, temperature, topk):
        k = min(topk, num_valid)
        packed = torch.empty(len(x), 13, dtype=torch.float64)
        lists = torch.empty(2, len(x), k)
        ids = torch.empty(len(x), k, dtype=torch.int64)
        out = OUTPUTS(
            packed.data_ptr(), lists[0].data_ptr(), lists[1].data_ptr(), ids.data_ptr(), k
        )
        logits = logits_of(x, y, labels, num_valid, temperature)
        library.emulated_stats(ctypes.byref(logits), ctypes.byref(out), LONG(len(x)))
        return packed, lists[0], lists[1], ids

    def merge_stats(packed, optimal_floor):
        out = torch.empty(packed.shape[1], 10, dtype=torch.float64)
        sizes = (LONG(packed.shape[0]), LONG(packed.shape[1]))
        library.emulated_merge(_pointer(packed), *sizes, DOUBLE(optimal_floor), _pointer(out))
        return out

    def merge_topk(student, teacher, lengths, topk):
        ranks, tokens, size = student.shape
        out = torch.empty(2, tokens, topk)
        taken = torch.empty(tokens, ranks, dtype=torch.int64)
        inputs = student.contiguous(), teacher.contiguous(), lengths
        lists = LISTS(*(tensor.data_ptr() for tensor in inputs), ranks, tokens, size)
        merged = MERGED(out[0].data_ptr(), out[1].data_ptr(), taken.data_ptr(), topk)
        library.emulated_topk(ctypes.byref(lists), ctypes.byref(merged))
        return out[0], out[1], taken

    def gradient_into(out, x, y, labels, final, c, num_valid, tau, ids=None, taken=None, s=None):
        pointers = [_pointer(z) for z in (final, c, ids, taken, s)]
        inputs = INPUTS(*pointers, 0 if ids is None else ids.shape[1])
        logits = logits_of(x, y, labels, num_valid, tau)
        output = OUTPUT(out.data_ptr(), out.stride(0), out.shape[1], DTYPES.index(out.dtype))
        arguments = (ctypes.byref(value) for value in (logits, inputs, output))
        library.emulated_gradient(*arguments, LONG(len(x)))
        return out

    def logits_gradient(x, *arguments):
        return gradient_into(torch.empty_like(x), x, *arguments)

    def logits_gradient_(x, *arguments):
        gradient_into(x, x, *arguments)

    def logits_gradient_narrow_(x, y, *arguments):
        gradient_into(narrow_rows(y, x.shape[1]), x, y, *arguments)

    return Kernels(
        "cuda",
        local_stats,
        merge_stats,
        merge_topk,
        logits_gradient,
        logits_gradient_,
        logits_gradient_narrow_,
    )
