#!/usr/bin/env bash
# Builds, checks and benchmarks the CUDA kernels on a GPU machine, in one call of under 8 minutes.
# Needs: a CUDA torch, nvcc, ninja, pybind11. Usage: tests/gpu/run_all.sh [folder for results]
set -euo pipefail
cd "$(dirname "$0")/../.."
results="${1:-gpu_results}"
mkdir -p "$results"

python - <<'PY' || exit 0
import sys
try:
    import torch
except ImportError:
    sys.exit("SKIPPED: torch is not installed here")
if not torch.cuda.is_available():
    sys.exit("SKIPPED: no CUDA device here; the kernels were not run")
name, version = torch.cuda.get_device_name(), torch.__version__
print(f"device {name}, torch {version}, CUDA {torch.version.cuda}")
PY

echo "== build"
MEGATRON_VOPD_CUDA=1 MAX_JOBS="$(nproc)" timeout 240 python setup.py --quiet build_ext --inplace
echo "== check"
PYTHONPATH=. timeout 150 python tests/gpu/check_kernels.py | tee "$results/check.txt"
echo "== benchmark"
PYTHONPATH=. timeout 90 python tools/benchmark_ops.py --device cuda --out "$results"
