# SPDX-License-Identifier: Apache-2.0
# `make run` and `make test` start from a fresh clone: they create .venv, install, build and fetch the data first.
# Nothing outside this folder is changed, except that the Debian package with the data is installed where that is allowed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
RUN_DIR ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := build/stamps
BUILD := build/cmake
DEBIAN_DATA := /usr/share/datasets/fashion-mnist
# CMake and Ninja come from the environment, so that none has to be installed.
TOOLS := PATH="$(CURDIR)/$(BIN):$$PATH"
FEDPAI_CMAKE_ARGS ?=
ifdef CI
FEDPAI_CMAKE_ARGS += -DFEDPAI_WERROR=ON
endif

.PHONY: help
help: ## show this list
	@echo "fedpai-kernels: make <target>"
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)$$/  \1|\2/p' $(MAKEFILE_LIST) | sort | column -t -s '|'

# ---- set-up ---------------------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	@tools/check_host.sh $(PYTHON)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first and alone: everything after it is then resolved around this version.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PY) -m pip install torch==2.13.0
	@touch $@

$(STAMPS)/tools: pyproject.toml $(STAMPS)/torch
	$(PY) -m pip install --quiet "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13"
	@touch $@

$(STAMPS)/package: pyproject.toml setup.py $(STAMPS)/tools
	FEDPAI_BUILD_DIR=$(BUILD) FEDPAI_CMAKE_ARGS="$(FEDPAI_CMAKE_ARGS)" \
	  $(PY) -m pip install --quiet --no-build-isolation --editable ".[fed,bench,dev]"
	@touch $@

# Other libraries' kernels, to measure against. Where one cannot be built, the benchmarks say that it is absent.
$(STAMPS)/rivals: $(STAMPS)/package
	@$(PY) -m pip install --quiet "sparseprop==0.1.14" scipy || echo "SparseProp could not be installed; going on without it"
	@touch $@

# Triton for the CPU: its interpreter and its compiler, for the tests of the kernels for GPUs. 286 MB to fetch, 1.0 GB
# installed, so it is no part of `develop`; without it those tests are skipped and say so. CI has it: see `pytest`.
$(STAMPS)/triton: $(STAMPS)/package
	$(PY) -m pip install --quiet --no-deps "triton>=3.8"
	@touch $@

.PHONY: develop
develop: $(STAMPS)/package build ## create .venv with the package in it (editable), and build

.PHONY: data
data: ## fetch Fashion-MNIST (a Debian package)
	@tools/fetch_data.sh

# ---- build ----------------------------------------------------------------------------------------------------------

.PHONY: build
build: $(STAMPS)/tools ## compile the module into fedpai_kernels/ (incremental)
	@$(TOOLS) cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" -DFEDPAI_MODULE_DIR=$(CURDIR)/fedpai_kernels \
	  -DFEDPAI_BUILD_TESTS=ON $(FEDPAI_CMAKE_ARGS) --log-level=WARNING
	@$(TOOLS) cmake --build $(BUILD) --target place_module

# ---- run ------------------------------------------------------------------------------------------------------------

.PHONY: run
# An interrupted run goes on; a finished one stays, and the next takes a folder of its own.
run: develop data ## the demonstration: dense FedAvg against the sparse network, report included
	@options="--preset demo --uplink 1MB/s --downlink 10MB/s"; \
	if [ ! -e $(RUN_DIR)/config.json ]; then options="$$options --out $(RUN_DIR)"; \
	elif [ ! -e $(RUN_DIR)/report.html ]; then options="$$options --out $(RUN_DIR) --resume"; fi; \
	if [ ! -d $(DEBIAN_DATA) ] && [ -d data/fashion-mnist ]; then options="$$options --data-root data"; fi; \
	set -x; exec $(BIN)/fedpai run $$options

# ---- checks ---------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(STAMPS)/package ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: ctest
ctest: build ## the C++ kernel tests, as optimised for use
	@$(TOOLS) cmake --build $(BUILD)
	@$(TOOLS) ctest --test-dir $(BUILD) --parallel 2 --output-on-failure --no-tests=error

.PHONY: sanitize
sanitize: $(STAMPS)/tools ## the C++ kernel tests under the address and undefined-behaviour sanitizers
	@$(TOOLS) cmake --preset sanitize $(FEDPAI_CMAKE_ARGS) --log-level=WARNING
	@$(TOOLS) cmake --build --preset sanitize
	@$(TOOLS) ctest --preset sanitize

# Debian: g++-aarch64-linux-gnu and qemu-user. Not a part of `make test`.
.PHONY: aarch64
aarch64: $(STAMPS)/tools ## the C++ kernel tests with NEON, cross-compiled and emulated
	@$(TOOLS) cmake --preset aarch64 $(FEDPAI_CMAKE_ARGS) --log-level=WARNING
	@$(TOOLS) cmake --build --preset aarch64
	@$(TOOLS) ctest --preset aarch64

# Continuous integration runs the tests of the Triton kernels as well, wherever Triton has a wheel.
ifdef CI
ifneq ($(filter $(shell uname -sm | tr ' ' '-'),Linux-x86_64 Linux-aarch64),)
TRITON_IN_CI := $(STAMPS)/triton
endif
endif

# First what must run by itself, then the rest in two processes: the summary of these closes the output. Each has two
# threads, so that what is computed by several still is; one that waits sleeps, or it would hold the other's core.
PYTEST_PROCESSES ?= 2
PYTEST_THREADS := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE

.PHONY: pytest
pytest: develop data $(TRITON_IN_CI) ## the Python tests
	@$(PY) -m pytest -q -m "alone and not bench"
	@$(PYTEST_THREADS) $(PY) -m pytest -q -m "not alone and not bench" -n $(PYTEST_PROCESSES) --dist worksteal

.PHONY: triton
triton: build $(STAMPS)/triton ## the Triton kernels in the interpreter, and compiled for sm_80 and sm_90 (installs Triton, 1.0 GB)
	@$(PY) -m pytest -q tests/triton

# pytest comes last: its summary line closes the output.
.PHONY: test
test: develop lint ctest sanitize pytest ## every check; with CI=1, as in CI, the Triton kernels too (installs Triton)

.PHONY: bench
bench: develop $(STAMPS)/rivals ## kernel and training-step benchmarks
	$(PY) -m pytest -m bench benchmarks

# ---- clean ----------------------------------------------------------------------------------------------------------

.PHONY: clean
clean: ## remove what was built (keeps .venv, data and runs)
	rm -rf build dist *.egg-info fedpai_kernels/*.so .mypy_cache .ruff_cache .pytest_cache

.PHONY: distclean
distclean: clean ## also remove .venv
	rm -rf $(VENV)
