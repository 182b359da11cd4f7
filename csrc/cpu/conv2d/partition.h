// SPDX-License-Identifier: Apache-2.0
// Cutting ranges into parts, and work among threads.
#pragma once

#include <cstdint>
#include <vector>

namespace fedpai {

// Splits [0, extent) into ceil(extent / largest) parts whose sizes differ by at most one; returns the starts and the end.
std::vector<std::int64_t> balanced_cuts(std::int64_t extent, std::int64_t largest);

// Splits [0, work.size()) into `parts` ranges of about equal work, some perhaps empty; returns the starts and the end.
std::vector<std::int64_t> cut_by_work(const std::vector<std::int64_t>& work, std::int64_t parts);

// How threads share a tiled pass; the cost model asks the same as the walks.

// Lane groups of a unit: `groups`, or fewer where threads would then find no unit each.
std::int64_t groups_per_unit(std::int64_t groups, std::int64_t lane_groups, std::int64_t patches, std::int64_t threads);

// Whether threads share the dest channels too, each packing every unit, because they cannot share the units evenly.
bool sums_split_rows(std::int64_t units, std::int64_t threads);

// The same for a weight gradient. Sharing units costs every thread a set of sums, and an extra pass over them, so it is for
// few of them.
bool gradient_splits_rows(std::int64_t units, std::int64_t threads, std::int64_t sums_bytes, std::int64_t dest_channels);

}  // namespace fedpai
