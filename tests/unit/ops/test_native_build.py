"""The extension is built, registered and reachable through one door; merge_topk is exact."""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.ops import native, reference
from megatron_vopd.trainer.loss import require_kernels

CPU = torch.device("cpu")


def per_rank_lists(logits_TV, teacher_TV, bounds, k):
    """Stack sorted lists of contiguous shards, as ranks would send them (padding: +inf)."""
    width = min(k, max(stop - start for start, stop in bounds))
    shape = (len(bounds), logits_TV.shape[0], width)
    student, teacher = torch.full(shape, torch.inf), torch.full(shape, torch.inf)
    lengths = torch.tensor([min(k, stop - start) for start, stop in bounds])
    for rank, (start, stop) in enumerate(bounds):
        values, order = torch.sort(logits_TV[:, start:stop], dim=-1, descending=True, stable=True)
        n = int(lengths[rank])
        student[rank, :, :n] = values[:, :n]
        teacher[rank, :, :n] = teacher_TV[:, start:stop].gather(1, order)[:, :n]
    return student, teacher, lengths


def logits(kind: str, num_tokens: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    gaussian = torch.randn(num_tokens, vocab_size, generator=generator) * 3
    rows = {
        "gaussian": gaussian,
        "ties": gaussian.round(),
        "constant": torch.zeros(num_tokens, vocab_size),
        "signed_zeros": torch.where(gaussian > 0, 0.0, -0.0),
        "minus_inf": torch.where(gaussian > 2, gaussian, -torch.inf),
        "nan": torch.where(gaussian > 6, torch.nan, gaussian),
    }
    return rows[kind]


@pytest.mark.parametrize(
    "kind", ["gaussian", "ties", "constant", "signed_zeros", "minus_inf", "nan"]
)
@pytest.mark.parametrize("bounds", [[(0, 301)], [(0, 150), (150, 151), (151, 151), (151, 301)]])
@pytest.mark.parametrize("k", [1, 17, 301])
def test_merge_topk_is_the_global_answer(kind, bounds, k):
    logits_TV, teacher_TV = logits(kind, 9, 301), torch.arange(301.0).expand(9, -1)
    lists = per_rank_lists(logits_TV, teacher_TV, bounds, k)
    expected = torch.sort(logits_TV, dim=-1, descending=True, stable=True)
    for kernels in (
        native.resolve("cpu", CPU, torch.float32),
        native.resolve("reference", CPU, torch.float32),
    ):
        student, teacher, taken = kernels.merge_topk(*lists, k)
        # The teacher's value is the id here, so this compares the sets and their order.
        assert torch.equal(teacher.long(), expected.indices[:, :k]), kernels.name
        torch.testing.assert_close(student, expected.values[:, :k], rtol=0, atol=0, equal_nan=True)
        edges = torch.tensor([stop for _, stop in bounds[:-1]])
        ranks = torch.bucketize(expected.indices[:, :k].contiguous(), edges, right=True)
        assert torch.equal(taken, torch.nn.functional.one_hot(ranks, len(bounds)).sum(1))


def test_merge_topk_passes_opcheck():
    kernels = native.resolve("cpu", CPU, torch.float32)
    lists = per_rank_lists(logits("ties", 5, 64), torch.randn(5, 64), [(0, 40), (40, 64)], 8)
    torch.library.opcheck(kernels.merge_topk.default, (*lists, 8))


@pytest.mark.parametrize(("k", "length"), [(0, 2), (5, 2), (4, 3)])
def test_merge_topk_refuses_bad_arguments(k, length):
    student = torch.zeros(2, 3, 2)
    lengths = torch.full((2,), length)
    with pytest.raises(ValueError, match=r"topk|lengths"):
        native.resolve("cpu", CPU, torch.float32).merge_topk(student, student, lengths, k)
    if length == 2:
        with pytest.raises(ValueError, match="topk"):
            reference.merge_topk(student, student, lengths, k)


def test_build_info_names_what_was_built():
    info = native.build_info()
    assert info["detected_isa"] in ("portable", "avx2", "avx512")
    assert "gcc" in info["compiler"]
    if torch.version.cuda is None:
        assert info["cuda_archs"] == ""


def test_every_instruction_set_up_to_the_best_can_be_chosen():
    module = native.extension()
    assert module is not None
    best = native.build_info()["detected_isa"]
    names = ("portable", "avx2", "avx512")
    for name in names[: names.index(best) + 1]:
        module.set_isa(name)
        assert native.build_info()["isa"] == name
    with pytest.raises(ValueError, match="name"):
        module.set_isa("neon")


def test_an_implementation_that_is_asked_for_and_missing_raises():
    with pytest.raises(ValueError, match="impl: expected one of"):
        native.resolve("triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="'cuda' is not available"):
        native.resolve("cuda", CPU, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        native.resolve("cpu", CPU, torch.float64)
    assert native.resolve("auto", CPU, torch.float64).name == "reference"
    assert native.resolve("auto", CPU, torch.bfloat16).name == "cpu"


@pytest.fixture
def failing_import(monkeypatch):
    """Return a function after which the extension's import raises the given error."""
    original = importlib.import_module

    def fail_with(error):
        def import_module(name):
            if name == "megatron_vopd._C":
                raise error
            return original(name)

        native._loaded.cache_clear()
        monkeypatch.setattr(importlib, "import_module", import_module)

    yield fail_with
    monkeypatch.undo()
    native._loaded.cache_clear()


def test_an_extension_that_is_not_built_is_named(failing_import):
    failing_import(ModuleNotFoundError("No module named 'megatron_vopd._C'"))
    assert native.extension() is None
    with pytest.raises(UserError, match=r"parallel.device: got cpu.*is not built; build it with"):
        require_kernels("cpu")


def test_an_extension_that_cannot_be_loaded_says_why(failing_import):
    """One that was compiled against another torch misses some of its symbols."""
    failing_import(ImportError("_C.so: undefined symbol: _ZN3c104impl\n  (torch)"))
    assert native.extension() is None
    with pytest.raises(UserError) as error:
        require_kernels("cpu")
    line = str(error.value)
    assert "\n" not in line and "cannot be loaded (_C.so: undefined symbol: _ZN3c104impl" in line
    assert line.endswith("again")
    with pytest.raises(ValueError, match="cannot be loaded"):
        native.build_info()


def test_kernels_for_a_gpu_are_asked_for_at_the_start(monkeypatch):
    require_kernels("cpu")
    monkeypatch.setattr(native.extension(), "build_info", lambda: {"cuda_archs": ""})
    with pytest.raises(UserError, match="built without CUDA; rebuild with MEGATRON_VOPD_CUDA=1"):
        require_kernels("cuda")
