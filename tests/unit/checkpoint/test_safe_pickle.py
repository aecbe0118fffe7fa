"""X1: pickles are read without running anything of them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest

from megatron_vopd.checkpoint.safe_pickle import Inert, PickleRefusedError, read_inert


def test_pickles_become_inert() -> None:
    value = read_inert(io.BytesIO(pickle.dumps({"path": Path("x")})), {"pathlib.PosixPath"})
    assert isinstance(value["path"], Inert) and value["path"].args == ("x",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(os.system),
        pickle.dumps(print),
        b"cpathlib\nPosixPath\n(S'x'\nS'y'\nd}b.",
        b"\x80\x04",
        b"",
        pickle.dumps(Path("x"))[:-4],
    ],
)
def test_other_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(PickleRefusedError):
        read_inert(io.BytesIO(content), {"pathlib.PosixPath"})
