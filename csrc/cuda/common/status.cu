// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/launching.h"

int fedpai_cuda_interface(void) { return FEDPAI_CUDA_INTERFACE; }

int fedpai_cuda_device_count(int* count) {
  *count = 0;
  return static_cast<int>(cudaGetDeviceCount(count));
}

const char* fedpai_cuda_message(int code) {
  switch (code) {
    case FEDPAI_CUDA_TOO_LARGE:
      return "a tensor has 2^31 elements or more, or a stride is beyond what the kernels can index";
    case FEDPAI_CUDA_MISALIGNED:
      return "a tensor with a batch of whole fours does not begin at a multiple of four elements";
    case FEDPAI_CUDA_WORKSPACE:
      return "the workspace is too small";
    case FEDPAI_CUDA_BAD_ARGUMENT:
      return "a dtype, count or rule that the library does not have";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
