// SPDX-License-Identifier: Apache-2.0
// Elements of the activations that the CUDA kernels take, as floats.
#pragma once

#include <cstdint>

#include "cuda/common/vector.h"

namespace fedpai::tests {

inline float as_float(float x) { return x; }
inline float as_float(cuda::BFloat16 x) { return cuda::float_of_bits(static_cast<std::uint32_t>(x.bits) << 16); }

inline void assign(float& to, float x) { to = x; }
inline void assign(cuda::BFloat16& to, float x) { to.bits = static_cast<std::uint16_t>(cuda::rounded_to_bf16(x)); }

}  // namespace fedpai::tests
