# SPDX-License-Identifier: Apache-2.0
# The kernels are compiled once per instruction set, from csrc/cpu/targets/<target>.cpp, each with flags of its own.
# csrc/cpu/dispatch.cpp learns by FEDPAI_HAVE_<TARGET> which of them exist and chooses at run time.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(FEDPAI_CPU_TARGETS scalar avx2 avx512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(FEDPAI_CPU_TARGETS scalar neon)
else()
  set(FEDPAI_CPU_TARGETS scalar)
endif()

# -O2: unrolling loops over arrays makes the build three times slower and the code no faster.
set(FEDPAI_FLAGS_scalar "$<$<CONFIG:Release>:-O2>")
set(FEDPAI_FLAGS_neon) # part of the aarch64 baseline
set(FEDPAI_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(FEDPAI_FLAGS_avx512
  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # gcc's own avx512 headers trip over these two (gcc bug 105593).
  list(APPEND FEDPAI_FLAGS_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# Adds the kernels of every instruction set that this architecture can have to `library`. Each is an object library
# fedpai_cpu_<target>, so that a test can look at its objects.
function(fedpai_add_cpu_targets library)
  foreach(target IN LISTS FEDPAI_CPU_TARGETS)
    add_library(fedpai_cpu_${target} OBJECT csrc/cpu/targets/${target}.cpp)
    target_include_directories(fedpai_cpu_${target} PRIVATE csrc)
    target_link_libraries(fedpai_cpu_${target} PRIVATE fedpai_settings OpenMP::OpenMP_CXX)
    target_compile_options(fedpai_cpu_${target} PRIVATE ${FEDPAI_FLAGS_${target}})
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:fedpai_cpu_${target}>)
    string(TOUPPER ${target} upper)
    target_compile_definitions(${library} PUBLIC FEDPAI_HAVE_${upper}=1)
  endforeach()
endfunction()

# A target `name` that puts what `built` is linked to at `file`. Copied under another name and renamed: a process that
# has the old file mapped keeps it intact.
function(fedpai_place name built file)
  add_custom_command(
    OUTPUT ${file}
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:${built}> ${file}.new
    COMMAND ${CMAKE_COMMAND} -E rename ${file}.new ${file}
    DEPENDS ${built}
    COMMENT "Placing ${file}" VERBATIM)
  add_custom_target(${name} ALL DEPENDS ${file})
endfunction()
