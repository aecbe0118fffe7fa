"""The one table of data types against torch, safetensors and the configuration."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vopd.config.types import Dtype as ConfigDtype
from megatron_vopd.hf.dtypes import CONFIG_DTYPES, DTYPES, SAFETENSORS_DTYPES, Dtype
from megatron_vopd.hf.tensors import dtype_name


@pytest.mark.parametrize("row", DTYPES.values(), ids=lambda row: row.name)
def test_every_name_is_the_one_in_use(row: Dtype, tmp_path) -> None:
    values = torch.ones(3, dtype=row.torch_dtype)
    assert (dtype_name(values.dtype), values.element_size()) == (row.name, row.num_bytes)
    save_file({"x": values}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert SAFETENSORS_DTYPES[file.get_slice("x").get_dtype()] is row
    saved = io.BytesIO()
    torch.save(values, saved)
    with zipfile.ZipFile(saved) as archive:
        (pickled,) = [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    assert b"torch\n" + row.storage.encode() + b"\n" in pickled


def test_a_configuration_offers_what_the_table_has() -> None:
    assert set(get_args(ConfigDtype)) == set(CONFIG_DTYPES) == {"bf16", "fp32"}


def test_the_memory_estimate_needs_no_torch() -> None:
    code = "import sys, megatron_vopd.preflight.memory; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
