// SPDX-License-Identifier: Apache-2.0
// Rounds floats to bfloat16 and widens them again, with several threads. Every element by itself: the bits depend on
// nothing else.
#pragma once

#include <cstdint>

#include "cpu/bf16/kernels.h"

namespace fedpai {

// x, y: n elements each, which do not overlap.
void round_to_bf16(const float* x, Bf16* y, std::int64_t n, int threads);
void widen_bf16(const Bf16* x, float* y, std::int64_t n, int threads);

}  // namespace fedpai
