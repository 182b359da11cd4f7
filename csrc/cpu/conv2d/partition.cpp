// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/partition.h"

#include <algorithm>

namespace fedpai {

std::vector<std::int64_t> balanced_cuts(std::int64_t extent, std::int64_t largest) {
  const std::int64_t parts = std::max<std::int64_t>(1, (extent + largest - 1) / largest);
  std::vector<std::int64_t> cuts;
  for (std::int64_t i = 0; i <= parts; ++i) cuts.push_back(extent * i / parts);
  return cuts;
}

std::vector<std::int64_t> cut_by_work(const std::vector<std::int64_t>& work, std::int64_t parts) {
  std::int64_t total = 0;
  for (const std::int64_t w : work) total += w;
  std::vector<std::int64_t> cuts{0};
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < work.size(); ++i) {
    while (static_cast<std::int64_t>(cuts.size()) < parts &&
           sum * parts >= total * static_cast<std::int64_t>(cuts.size())) {
      cuts.push_back(static_cast<std::int64_t>(i));
    }
    sum += work[i];
  }
  while (static_cast<std::int64_t>(cuts.size()) <= parts) cuts.push_back(static_cast<std::int64_t>(work.size()));
  return cuts;
}

std::int64_t groups_per_unit(std::int64_t groups, std::int64_t lane_groups, std::int64_t patches, std::int64_t threads) {
  return std::min(groups, std::max<std::int64_t>(1, lane_groups * patches / threads));
}

bool sums_split_rows(std::int64_t units, std::int64_t threads) { return units < 4 * threads && units % threads != 0; }

bool gradient_splits_rows(std::int64_t units, std::int64_t threads, std::int64_t sums_bytes, std::int64_t dest_channels) {
  constexpr std::int64_t kPrivateSumsBytes = 1 << 20;
  return units < threads || (sums_bytes > kPrivateSumsBytes && dest_channels >= threads);
}

}  // namespace fedpai
