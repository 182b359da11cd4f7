// SPDX-License-Identifier: Apache-2.0
// V neighbours of an array, moved by one instruction and computed with as float32.
//
// BFloat16 is the upper half of a float32. It is rounded to nearest, ties to even, and what is NaN stays NaN, as on the CPU.
#pragma once

#include <cstring>

#include "cuda/common/device.h"

namespace fedpai::cuda {

struct BFloat16 {
  std::uint16_t bits;
};

FEDPAI_DEVICE float float_of_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FEDPAI_DEVICE std::uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FEDPAI_DEVICE std::uint32_t rounded_to_bf16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  if (value != value) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

FEDPAI_DEVICE float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

template <int V>
struct Floats {
  float at[V];
};

template <int V>
FEDPAI_DEVICE Floats<V> zeros() {
  Floats<V> result;
  FEDPAI_DEVICE_UNROLL
  for (int v = 0; v < V; ++v) result.at[v] = 0.0f;
  return result;
}

// 16 bytes of float32, 8 of BFloat16; addresses are multiples of that.
struct alignas(16) FourFloats {
  float at[4];
};
struct alignas(8) FourBf16 {
  std::uint32_t pair[2];  // the earlier element in the lower half
};

FEDPAI_DEVICE Floats<4> load(const float* from, Floats<4>*) {
  const FourFloats raw = *reinterpret_cast<const FourFloats*>(from);
  return {{raw.at[0], raw.at[1], raw.at[2], raw.at[3]}};
}
FEDPAI_DEVICE Floats<1> load(const float* from, Floats<1>*) { return {{*from}}; }
FEDPAI_DEVICE Floats<4> load(const BFloat16* from, Floats<4>*) {
  const FourBf16 raw = *reinterpret_cast<const FourBf16*>(from);
  return {{float_of_bits(raw.pair[0] << 16), float_of_bits(raw.pair[0] & 0xffff0000u),
           float_of_bits(raw.pair[1] << 16), float_of_bits(raw.pair[1] & 0xffff0000u)}};
}
FEDPAI_DEVICE Floats<1> load(const BFloat16* from, Floats<1>*) {
  return {{float_of_bits(static_cast<std::uint32_t>(from->bits) << 16)}};
}

// V elements from `from` on.
template <int V, class T>
FEDPAI_DEVICE Floats<V> load(const T* from) {
  return load(from, static_cast<Floats<V>*>(nullptr));
}

FEDPAI_DEVICE void store(float* to, const Floats<4>& v) {
  *reinterpret_cast<FourFloats*>(to) = {{v.at[0], v.at[1], v.at[2], v.at[3]}};
}
FEDPAI_DEVICE void store(float* to, const Floats<1>& v) { *to = v.at[0]; }
FEDPAI_DEVICE void store(BFloat16* to, const Floats<4>& v) {
  *reinterpret_cast<FourBf16*>(to) = {{rounded_to_bf16(v.at[0]) | rounded_to_bf16(v.at[1]) << 16,
                                       rounded_to_bf16(v.at[2]) | rounded_to_bf16(v.at[3]) << 16}};
}
FEDPAI_DEVICE void store(BFloat16* to, const Floats<1>& v) { to->bits = static_cast<std::uint16_t>(rounded_to_bf16(v.at[0])); }

}  // namespace fedpai::cuda
