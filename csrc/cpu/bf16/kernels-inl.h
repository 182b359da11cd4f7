// SPDX-License-Identifier: Apache-2.0
// y = x rounded to bfloat16, and y = x widened to float.
//
// Rounding is to nearest, ties to even, as torch's: half of the last bit that stays, less one where that bit is even,
// is added to the bits of the float, and the carry does the rest, infinities and subnormals included. What is NaN stays
// NaN: the addition could carry one to zero, so its upper half is taken as it is, with the quiet bit set. Widening is
// exact.
//
// Layout: n elements side by side. Bound: memory; 6 bytes are moved per element, and the arithmetic is 8 operations a
// vector.
#pragma once

#include "cpu/bf16/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

FEDPAI_INLINE Bf16 bf16_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<Bf16>(bits >> 16 | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

FEDPAI_INLINE float float_of(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void bf16_round(const float* x, Bf16* y, std::int64_t n) {
  using V = Vec<float>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu_bf16(y + i, V::loadu(x + i));
  for (; i < n; ++i) y[i] = bf16_of(x[i]);
}

inline void bf16_widen(const Bf16* x, float* y, std::int64_t n) {
  using V = Vec<float>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu(y + i, V::loadu_bf16(x + i));
  for (; i < n; ++i) y[i] = float_of(x[i]);
}

constexpr Bf16Kernels make_bf16_kernels() { return {bf16_round, bf16_widen}; }

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
