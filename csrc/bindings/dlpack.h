// SPDX-License-Identifier: Apache-2.0
// The parts of DLPack that lend a CPU tensor to torch, and describe torch's: no tensor library is linked. Layout and
// names are those of dlpack/dlpack.h in https://github.com/dmlc/dlpack (Apache-2.0). The unversioned managed tensor is
// what a capsule named "dltensor" holds, and its layout is frozen; that of the exchange functions is frozen within a
// major version.
#pragma once

#include <cstdint>

namespace fedpai {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
constexpr std::int32_t kDLCPU = 1;
constexpr std::uint8_t kDLFloat = 2;

struct DLDataType {
  std::uint8_t code;  // 0: signed integer, 2: floating point, 4: bfloat16
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

// What the capsule "dlpack_exchange_api" of a tensor type holds, since DLPack 1.3: functions for C callers.
struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Describes a tensor without owning it: 0, or -1 with a Python exception set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};
constexpr std::uint32_t kDLPackMajor = 1;

}  // namespace fedpai
