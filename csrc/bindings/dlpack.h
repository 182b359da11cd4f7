// SPDX-License-Identifier: Apache-2.0
// The part of DLPack that lends a CPU tensor to torch: no tensor library is linked. Layout and names are those of
// dlpack/dlpack.h in https://github.com/dmlc/dlpack (Apache-2.0); this unversioned form is the one that a capsule named
// "dltensor" holds, and its layout is frozen.
#pragma once

#include <cstdint>

namespace fedpai {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
constexpr std::int32_t kDLCPU = 1;

struct DLDataType {
  std::uint8_t code;  // 0: signed integer, 2: floating point
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);  // called once, by whoever consumed the capsule
};

}  // namespace fedpai
