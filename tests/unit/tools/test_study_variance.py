"""The figures of docs/studies/variance.py, from gradients whose moments are known."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest

from tests.support import ROOT

SCRIPT = ROOT / "tools" / "study_variance.py"
NAMES = ["none", "full", "topk_reverse 5 (biased)", "exact"]
BATCHES, SIZE = 64, 40


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("variance_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gradients() -> np.ndarray:
    """[names, batches, size]: exact, and estimates with noise of 2 and of 1, and 0.7 of it."""
    draw = np.random.default_rng(0)
    exact = draw.normal(size=SIZE) + 0.3 * draw.normal(size=(BATCHES, SIZE))
    plain = exact + 2 * draw.normal(size=exact.shape)
    return np.stack([plain, exact + draw.normal(size=exact.shape), 0.7 * exact, exact])


def test_figures_are_those_of_the_definition(study: ModuleType, gradients: np.ndarray) -> None:
    flat = gradients.reshape(-1, SIZE)
    found = study.summarise(flat @ flat.T, NAMES, BATCHES, seed=0)

    def trace(values: np.ndarray) -> float:
        return float(np.trace(np.cov(values.T)))

    plain, exact = gradients[0], gradients[-1]
    for name, values in zip(NAMES, gradients, strict=True):
        assert found[name]["variance_ratio"][0] == pytest.approx(trace(values) / trace(plain))
        noise = trace(values - exact) / trace(plain - exact)
        assert found[name]["noise_ratio"][0] == pytest.approx(noise, abs=1e-12)
        along, squares = [], []
        for i in range(BATCHES):
            others = np.delete(exact, i, 0).mean(0)
            along.append((values[i] - exact[i]) @ others)
            squares.append(exact[i] @ others)
        bias = np.mean(along) / np.mean(squares)
        assert found[name]["bias"][0] == pytest.approx(bias, abs=1e-12)


def test_intervals_hold_what_is_true(study: ModuleType, gradients: np.ndarray) -> None:
    flat = gradients.reshape(-1, SIZE)
    found = study.summarise(flat @ flat.T, NAMES, BATCHES, seed=0)
    expected = {"none": (1.0, 0.0), "full": (0.25, 0.0), NAMES[2]: (None, -0.3)}
    for name, (noise, bias) in expected.items():
        _, low, high = found[name]["bias"]
        assert low <= bias + 1e-12 and bias - 1e-12 <= high, name
        assert high - low < 0.5, f"{name}: an interval that would hold anything"
        if noise is not None:
            _, low, high = found[name]["noise_ratio"]
            assert low <= noise <= high, name
    assert found[NAMES[2]]["bias"][2] < -0.2, "a bias is seen"
