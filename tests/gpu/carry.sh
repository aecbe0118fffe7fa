#!/usr/bin/env bash
# What accept.sh needs on a GPU machine without a network: a folder to carry there (about 5 MB).
#   tests/gpu/carry.sh FOLDER [PYTHON_VERSION]        then, there: CARRY=FOLDER tests/gpu/accept.sh
# The machine itself must have CUDA's compiler, torch >= 2.11 for CUDA, transformers, tokenizers,
# safetensors, einops, xxhash, PyYAML, rich, psutil, packaging, ninja, pybind11 and setuptools.
# vLLM is too large to carry: only its two modules for CUDA IPC go along, where vLLM
# is installed here (`make engine`). TransformerEngine stays behind too.
set -euo pipefail
if [[ $# -lt 1 || $# -gt 2 || $1 == -* ]]; then
  echo "usage: carry.sh FOLDER [PYTHON_VERSION]" >&2
  exit 2
fi
folder=$1
version=${2:-3.12}
python=${PYTHON:-python3}
mkdir -p "$folder"

platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform any)
# megatron-core in the version of pyproject.toml's tests; pydantic with the core that it names.
"$python" -m pip download --quiet --only-binary=:all: --no-deps --dest "$folder" \
  --python-version "$version" --implementation cp "${platforms[@]}" \
  megatron-core==0.16.1 annotated-types typing-inspection pydantic
core=$(unzip -p "$folder"/pydantic-[0-9]*.whl '*/METADATA' | tr -d '\r' |
  sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p')
"$python" -m pip download --quiet --only-binary=:all: --no-deps --dest "$folder" \
  --python-version "$version" --implementation cp "${platforms[@]}" "$core"

# No __init__.py: Python takes the folders as a package without running vLLM's own start.
transfer=$("$python" -c '
import importlib.util
found = importlib.util.find_spec("vllm")
print(found.submodule_search_locations[0] if found else "")')/distributed/weight_transfer
if [[ -f $transfer/packed_tensor.py ]]; then
  mkdir -p "$folder/vllm/distributed/weight_transfer"
  cp "$transfer/packed_tensor.py" "$folder/vllm/distributed/weight_transfer/"
  mkdir -p "$folder/vllm/device_allocator"
  cp "${transfer%/distributed/*}/device_allocator/alloc_conf.py" "$folder/vllm/device_allocator/"
else
  echo "carry.sh: vLLM is not installed here; accept.sh's step ipc will fail (make engine)" >&2
fi
find "$folder" -type f -printf '%10s %P\n' | sort -n
du -sh "$folder"
