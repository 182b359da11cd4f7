# SPDX-License-Identifier: Apache-2.0
# Compiler settings that every object shares, as the interface library fedpai_settings.

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
# Off for every object: the linker must never keep one instruction set's copy of a function for another's callers.
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_package(OpenMP COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(FATAL_ERROR
    "No OpenMP for the compiler ${CMAKE_CXX_COMPILER}. The kernels need it to use more than one core.\n"
    "Use gcc (Debian: apt install g++), or clang with libgomp's headers; or name a compiler with CXX=g++.")
endif()

add_library(fedpai_settings INTERFACE)

# No fast-math anywhere. Contraction is off so that a product and a sum written apart stay apart on every
# instruction set; where a fused multiply-add is wanted, the kernel says so.
target_compile_options(fedpai_settings INTERFACE -ffp-contract=off)

target_compile_options(fedpai_settings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wundef -Wvla -Wcast-qual -Wnon-virtual-dtor -Woverloaded-virtual
  -Wdouble-promotion)
if(FEDPAI_WERROR)
  target_compile_options(fedpai_settings INTERFACE -Werror)
endif()

if(FEDPAI_SANITIZE)
  target_compile_options(fedpai_settings INTERFACE
    -fsanitize=${FEDPAI_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  target_link_options(fedpai_settings INTERFACE -fsanitize=${FEDPAI_SANITIZE})
endif()
