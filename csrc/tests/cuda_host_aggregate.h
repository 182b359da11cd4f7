// SPDX-License-Identifier: Apache-2.0
// Merging as a GPU does it, on the CPU: the threads and warps of a grid, one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/aggregate/aggregate.cuh"

namespace fedpai::cuda {

inline void run_mean(const MeanArgs& args, bool compensated) {
  constexpr std::int64_t behind = 5;  // whole blocks: a few threads more than there are elements
  for (std::int64_t j = 0; j < args.n + behind; ++j) {
    compensated ? mean_element<true>(args, j) : mean_element<false>(args, j);
  }
}

inline void run_segments(const SegmentArgs& args) {
  std::fill_n(args.begins, (std::int64_t{args.segments} + 1) * args.clients, 0);
  std::fill_n(args.wrong, args.clients, 0);
  for (std::int32_t k = 0; k < args.clients; ++k) {
    constexpr std::int64_t behind = 3;
    const std::int64_t count = args.offsets[k + 1] - args.offsets[k];
    for (std::int64_t i = count + behind; i >= 0; --i) find_segments(args, k, i);  // in whatever order threads come
  }
}

template <bool Compensated>
void run_masked_mean(const MaskedMeanArgs& args) {
  for (std::int64_t s = 0; s < segments_of(args.n); ++s) {
    std::vector<SegmentSums<Compensated>> sums(1);
    merge_segment<Compensated>(args, HostWarp(), sums.data(), static_cast<std::int32_t>(s));
  }
}

}  // namespace fedpai::cuda
