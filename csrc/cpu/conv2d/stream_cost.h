// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/conv2d/tiling.h"

namespace fedpai {

// How the streamed walk would go.
struct StreamChoice {
  std::int64_t blocks;  // of source channels
  double cycles;        // the whole pass on one core, to compare with Tiling::cycles
};

StreamChoice choose_stream(const TilingProblem& problem);

}  // namespace fedpai
