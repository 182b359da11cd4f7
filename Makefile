# SPDX-License-Identifier: Apache-2.0
PY := .venv/bin/python
BUILD := build/cmake

.PHONY: build
build: ## compile the module into fedpai_kernels/ (incremental)
	.venv/bin/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath .venv/bin/ninja) -DFEDPAI_MODULE_DIR=$(CURDIR)/fedpai_kernels $(FEDPAI_CMAKE_ARGS)
	.venv/bin/cmake --build $(BUILD)
