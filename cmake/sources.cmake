# SPDX-License-Identifier: Apache-2.0
# Every C++ source file of the project except the tests (csrc/tests/CMakeLists.txt). No globbing: a file that is not
# listed is not built.

# Plain C++, compiled with the baseline instruction set.
set(FEDPAI_CORE_SOURCES
  csrc/memory/block_cache.cpp
  csrc/plan/plan.cpp
  csrc/plan/row_groups.cpp
  csrc/cpu/dispatch.cpp
  csrc/cpu/aggregate/aggregate.cpp
  csrc/cpu/bf16/bf16.cpp
  csrc/cpu/conv2d/axis.cpp
  csrc/cpu/conv2d/partition.cpp
  csrc/cpu/conv2d/tiling.cpp
  csrc/cpu/conv2d/tiled_schedule.cpp
  csrc/cpu/conv2d/stream_cost.cpp
  csrc/cpu/conv2d/stream_schedule.cpp
  csrc/cpu/conv2d/schedule.cpp
  csrc/cpu/conv2d/schedule_cache.cpp
  csrc/cpu/conv2d/patch.cpp
  csrc/cpu/conv2d/run_tiled.cpp
  csrc/cpu/conv2d/run_tiled_grad.cpp
  csrc/cpu/conv2d/run_streamed.cpp
  csrc/cpu/conv2d/run_streamed_backward.cpp
  csrc/cpu/conv2d/conv2d.cpp
  csrc/cpu/layout/layout.cpp
  csrc/cpu/machine/machine.cpp
  csrc/cpu/norm/group_norm.cpp
  csrc/cpu/norm/norm.cpp
  csrc/cpu/optim/optim.cpp
  csrc/cpu/pool/pool.cpp
  csrc/cuda/conv2d/streams.cpp)

# The only files that know Python.
set(FEDPAI_BINDING_SOURCES
  csrc/bindings/module.cpp
  csrc/bindings/aggregate.cpp
  csrc/bindings/bf16.cpp
  csrc/bindings/plan.cpp
  csrc/bindings/conv2d.cpp
  csrc/bindings/cuda.cpp
  csrc/bindings/group_norm.cpp
  csrc/bindings/layout.cpp
  csrc/bindings/machine.cpp
  csrc/bindings/memory.cpp
  csrc/bindings/norm.cpp
  csrc/bindings/optim.cpp
  csrc/bindings/pool.cpp
  csrc/bindings/tensor_reader.cpp)

# Compiled by nvcc alone; what they share with the host's tests is in headers.
set(FEDPAI_CUDA_SOURCES
  csrc/cuda/common/status.cu
  csrc/cuda/aggregate/aggregate.cu
  csrc/cuda/conv2d/conv2d.cu
  csrc/cuda/norm/norm.cu
  csrc/cuda/optim/optim.cu)
