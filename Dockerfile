# The pinned set for GPUs (constraints/gpu.txt) on NVIDIA's public image of CUDA 13.0, with nvcc and
# the headers of cuDNN and NCCL, which TransformerEngine's bindings are compiled against.
# NOT BUILT AND NOT RUN by this project yet: it had no container engine and no GPU.
#
#   docker build -t megatron_vopd .
#   docker run --rm --gpus all --ipc=host megatron_vopd                  # prints `vopd doctor`
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/opt/megatron_vopd/runs" megatron_vopd bash
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ make git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH CUDA_HOME=/usr/local/cuda

WORKDIR /opt/megatron_vopd
COPY constraints constraints
# vLLM first: it pins torch, and everything below is compiled against that torch.
RUN pip install --no-cache-dir -c constraints/gpu.txt vllm setuptools wheel ninja pybind11
# In a layer of its own, since it compiles for minutes and does not change with this package.
RUN pip install --no-cache-dir --no-build-isolation -c constraints/gpu.txt \
    "transformer-engine[core_cu13,pytorch]"

COPY . .
RUN MEGATRON_VOPD_CUDA=1 \
    pip install --no-cache-dir --no-build-isolation -c constraints/gpu.txt -e ".[gpu,engine]"

CMD ["vopd", "doctor", "--for", "gpu"]
