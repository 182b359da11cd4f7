// SPDX-License-Identifier: Apache-2.0
// What launchers share. Only nvcc sees this.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/fedpai_cuda.h"

namespace fedpai::cuda {

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Neither allocates nor waits: allowed while a stream is captured.
inline int count_sms(int* sms) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
  return static_cast<int>(error);
}

// What the launch before it met.
inline int launched() { return static_cast<int>(cudaGetLastError()); }

inline bool is_aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace fedpai::cuda
