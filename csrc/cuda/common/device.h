// SPDX-License-Identifier: Apache-2.0
// What lets one source be device code under nvcc and ordinary functions for every other compiler, so that tests run the
// same lines on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FEDPAI_DEVICE __device__ __forceinline__
#define FEDPAI_DEVICE_UNROLL _Pragma("unroll")
#define FEDPAI_DEVICE_ROLLED _Pragma("unroll 1")
#else
#define FEDPAI_DEVICE inline
#define FEDPAI_DEVICE_UNROLL
#define FEDPAI_DEVICE_ROLLED
#endif
