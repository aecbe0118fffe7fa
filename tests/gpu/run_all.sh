#!/usr/bin/env bash
# Builds, checks and benchmarks the CUDA kernels on a GPU machine, in one call of under 10 minutes.
# Needs: a CUDA torch, nvcc, ninja, pybind11. Usage: [PYTHON=python3] tests/gpu/run_all.sh [folder for results]
# Without torch or a CUDA device it says SKIPPED and succeeds; anything else that goes wrong fails.
set -euo pipefail
cd "$(dirname "$0")/../.."
results="${1:-gpu_results}"
python="${PYTHON:-python3}"
mkdir -p "$results"

status=0
"$python" - <<'PY' || status=$?
import sys
try:
    import torch
except ModuleNotFoundError:
    print("SKIPPED: torch is not installed here")
    sys.exit(77)
if not torch.cuda.is_available():
    print("SKIPPED: no CUDA device here; the kernels were not run")
    sys.exit(77)
name, version = torch.cuda.get_device_name(), torch.__version__
print(f"device {name}, torch {version}, CUDA {torch.version.cuda}")
PY
if [[ $status == 77 ]]; then
    exit 0
elif [[ $status != 0 ]]; then
    exit "$status"
fi

echo "== build"
MEGATRON_VOPD_CUDA=1 MAX_JOBS="$(nproc)" timeout 240 "$python" setup.py --quiet build_ext --inplace
echo "== check"
PYTHONPATH=. timeout 150 "$python" -u tests/gpu/check_kernels.py | tee "$results/check.txt"
echo "== benchmark"
PYTHONPATH=. timeout 180 "$python" tools/benchmark_ops.py --device cuda --out "$results"
