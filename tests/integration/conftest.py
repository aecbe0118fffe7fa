"""Fixtures of the tests with real engines."""

from __future__ import annotations

import pytest

from tests.support import harness


@pytest.fixture
def patient_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer: engines take 10 s each to start on two quiet cores, a minute on busy ones."""
    monkeypatch.setattr(harness, "WORLD_SECONDS", 900)
    monkeypatch.setattr(harness, "COLLECTIVE_SECONDS", 600)
