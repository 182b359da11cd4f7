# SPDX-License-Identifier: Apache-2.0
# libfedpai_cuda.so: the CUDA kernels behind a plain C interface, with the CUDA runtime inside, so that it needs nothing
# but a driver. FEDPAI_CUDA: AUTO builds it where nvcc is, ON asks for it, OFF leaves it out. Nothing else depends on it.

set(FEDPAI_CUDA AUTO CACHE STRING "Build libfedpai_cuda.so: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE FEDPAI_CUDA PROPERTY STRINGS AUTO ON OFF)
set(FEDPAI_BUILD_CUDA OFF)

if(FEDPAI_CUDA STREQUAL "OFF" OR FEDPAI_CUDA STREQUAL "FALSE" OR FEDPAI_CUDA STREQUAL "0")
  message(STATUS "CUDA kernels: not built, FEDPAI_CUDA is ${FEDPAI_CUDA}")
  return()
endif()

# Looked for first, because asking CMake for the language takes seconds even where there is none.
if(CMAKE_CUDA_COMPILER)
  set(FEDPAI_NVCC ${CMAKE_CUDA_COMPILER})
else()
  find_program(FEDPAI_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
endif()
if(NOT FEDPAI_NVCC)
  if(FEDPAI_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: not built, there is no nvcc")
    return()
  endif()
  message(FATAL_ERROR
    "FEDPAI_CUDA is ${FEDPAI_CUDA}, but there is no nvcc. Install the CUDA toolkit (12.4 or newer) and put its bin folder\n"
    "on PATH, or name the compiler with -DCMAKE_CUDA_COMPILER=/path/to/nvcc, or set FEDPAI_CUDA=OFF.")
endif()

set(CMAKE_CUDA_COMPILER ${FEDPAI_NVCC})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  # A100, H100, and PTX of the latter for what comes after.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
enable_language(CUDA)
set(FEDPAI_BUILD_CUDA ON)
message(STATUS "CUDA kernels: built by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(fedpai_cuda SHARED ${FEDPAI_CUDA_SOURCES})
target_include_directories(fedpai_cuda PRIVATE csrc)
set_target_properties(fedpai_cuda PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden CUDA_SEPARABLE_COMPILATION OFF)
# As on the CPU: no fast-math, and fused multiply-adds where the kernel says so.
set(FEDPAI_CUDA_FLAGS -fmad=false --compiler-options=-Wall,-Wextra,-Wshadow)
if(FEDPAI_WERROR)
  list(APPEND FEDPAI_CUDA_FLAGS -Werror=all-warnings)
endif()
target_compile_options(fedpai_cuda PRIVATE ${FEDPAI_CUDA_FLAGS})

if(FEDPAI_MODULE_DIR)
  fedpai_place(place_cuda fedpai_cuda ${FEDPAI_MODULE_DIR}/libfedpai_cuda.so)
  if(TARGET place_module)
    add_dependencies(place_module place_cuda)
  endif()
endif()
