// SPDX-License-Identifier: Apache-2.0
// Cutting ranges into parts.
#pragma once

#include <cstdint>
#include <vector>

namespace fedpai {

// Splits [0, extent) into ceil(extent / largest) parts whose sizes differ by at most one; returns the starts and the end.
std::vector<std::int64_t> balanced_cuts(std::int64_t extent, std::int64_t largest);

// Splits [0, work.size()) into `parts` ranges of about equal work, some perhaps empty; returns the starts and the end.
std::vector<std::int64_t> cut_by_work(const std::vector<std::int64_t>& work, std::int64_t parts);

}  // namespace fedpai
