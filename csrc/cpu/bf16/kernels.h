// SPDX-License-Identifier: Apache-2.0
// Floats as bfloat16 and back: what each instruction set provides.
#pragma once

#include <cstdint>

namespace fedpai {

// The upper half of a float: its sign, its exponent, and seven bits of its fraction.
using Bf16 = std::uint16_t;

// Pointers need no alignment beyond their type's; source and destination do not overlap. All n elements are written.
struct Bf16Kernels {
  void (*round)(const float* x, Bf16* y, std::int64_t n);
  void (*widen)(const Bf16* x, float* y, std::int64_t n);
};

}  // namespace fedpai
