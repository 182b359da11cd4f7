// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/tiling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/conv2d/kernels.h"

namespace fedpai {

namespace {

// Cycles, on a core with two loads, one store and two FMAs per cycle; fitted to timings of random tilings
// (lab/001_tiling_model).
constexpr double kFma = 0.92;         // per vector, operand in L1; with the loads and the loop around it
constexpr double kFetchL2 = 0.12;     // more, when a packed vector has to come from L2 again
constexpr double kFetchL3 = 0.62;     // the same from further away
constexpr double kEntryL2 = 0.47;     // per entry and tile, when the entries come from L2
constexpr double kTask = 11.0;        // the loop exit is mispredicted once per row
constexpr double kReload = 2.7;       // per dest vector and task after the first channel block: load and store again
constexpr double kLoad = 2.0;         // per dest vector and task of a weight gradient
constexpr double kLoadL3 = 0.2;       // more, when a unit's dest leaves L2 between channel blocks
constexpr double kSum = 0.5;          // per entry and tile: fold its lanes, read and write its sum
constexpr double kHalfLine = 1.0;     // per dest vector and task, when lane groups share a cache line
constexpr double kSourceLine = 7.3;   // per cache line that packing reads
constexpr double kDestLine = 15.9;    // per cache line of the dest
constexpr double kSourceRun = 53.0;   // per row of a channel's patch: the prefetcher starts anew
constexpr double kDestRun = 14.4;     // the same in the dest
constexpr double kTile = 1200.0;      // per register tile and channel block: a call, cold predictors

constexpr double kLineBytes = 64;
constexpr double kMostPackedBytes = 4e6;  // of several lane groups: every thread keeps that much

// How much of `bytes` walked over and over does not stay in a cache: none up to `from`, all beyond `to`.
double spilled(double bytes, double from, double to) { return std::clamp((bytes - from) / (to - from), 0.0, 1.0); }
double spilled_l1(double bytes) { return spilled(bytes, 24e3, 80e3); }
double spilled_l2(double bytes) { return spilled(bytes, 250e3, 500e3); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What the estimates of all tilings of one problem share.
struct Costs {
  const TilingProblem& p;
  double vector_bytes, entry_bytes, pairs, taps_per_pair;

  explicit Costs(const TilingProblem& problem)
      : p(problem),
        vector_bytes(static_cast<double>(p.element_size * p.lanes)),
        entry_bytes(static_cast<double>(4 + p.element_size)) {
    // A packed vector that left L1 is fetched once for all the taps of a channel pair that are next to each other.
    pairs = static_cast<double>(p.dest_channels * std::max<std::int64_t>(1, p.source_channels));
    const double taps = std::max(1e-6, static_cast<double>(p.entries) / pairs);
    taps_per_pair = std::max(1.0, 0.65 * taps / (1.0 - std::exp(-taps)));
  }

  double cycles(const Tiling& t) const;

  // Of a unit, without its halo.
  double packed_bytes(const Tiling& t) const {
    return vector_bytes * static_cast<double>(p.phases_h * p.phases_w) *
           static_cast<double>(t.blocks * t.groups * t.channel_block) *
           static_cast<double>(std::min(p.grid_h, t.tile_rows * t.patch_rows)) *
           static_cast<double>(std::min(p.grid_w, t.tile_columns * t.patch_columns));
  }
};

double Costs::cycles(const Tiling& t) const {
  const std::int64_t rows = ceil_div(p.grid_h, t.tile_rows), columns = ceil_div(p.grid_w, t.tile_columns);
  const std::int64_t groups = ceil_div(p.batch, static_cast<std::int64_t>(t.blocks) * p.lanes);
  const std::int64_t bundles = ceil_div(groups, t.groups);
  const std::int64_t boxes = ceil_div(rows, t.patch_rows) * ceil_div(columns, t.patch_columns);
  const auto tiles = static_cast<double>(rows * columns * groups);
  const auto blocks = static_cast<double>(std::max<std::int64_t>(1, ceil_div(p.source_channels, t.channel_block)));
  const auto entries = static_cast<double>(p.entries);
  const auto dest_channels = static_cast<double>(p.dest_channels);
  const auto pixels = static_cast<double>(p.grid_h * p.grid_w);
  const double dest_vectors = pixels * static_cast<double>(groups * t.blocks);
  const double tile_vectors = dest_vectors / tiles;

  const auto phases = static_cast<double>(p.phases_h * p.phases_w);
  const auto patch_h = static_cast<double>(std::min(p.grid_h, t.tile_rows * t.patch_rows));
  const auto patch_w = static_cast<double>(std::min(p.grid_w, t.tile_columns * t.patch_columns));
  const auto halo_h = static_cast<double>(p.halo_h), halo_w = static_cast<double>(p.halo_w);
  const double patch_pixels = phases * (patch_h + halo_h) * (patch_w + halo_w);
  const double tile_pixels =
      phases * (static_cast<double>(t.tile_rows) + halo_h) * (static_cast<double>(t.tile_columns) + halo_w);

  // What is walked again: a tile's window and the block's entries for every dest channel, a patch for every tile, and
  // a unit's dest for every channel block.
  const double block_vector_bytes = static_cast<double>(t.channel_block * t.blocks) * vector_bytes;
  const double block_entry_bytes = entries / blocks * entry_bytes;
  const double window = spilled_l1(tile_pixels * block_vector_bytes + 0.5 * block_entry_bytes);
  const double patch = spilled_l2(patch_pixels * block_vector_bytes + block_entry_bytes);
  const double dest =
      spilled_l2(patch_h * patch_w * dest_channels * static_cast<double>(t.blocks * t.groups) * vector_bytes);

  // The first channel block visits every dest channel, later ones those with entries in it.
  const double revisits = dest_channels * (blocks - 1.0) * (1.0 - std::exp(-entries / (dest_channels * blocks)));
  const double tasks = dest_channels + revisits;

  const double lines_per_pixel =
      std::max(1.0, static_cast<double>(t.blocks * t.groups) * vector_bytes / kLineBytes);
  const double dest_lines_per_pixel = std::max(1.0, static_cast<double>(t.blocks) * vector_bytes / kLineBytes);
  const auto source_patches = static_cast<double>(p.source_channels * boxes * bundles);

  double cycles = entries * dest_vectors * (kFma + window / taps_per_pair * ((1.0 - patch) * kFetchL2 + patch * kFetchL3));
  cycles += entries * tiles * spilled_l1(block_entry_bytes) * kEntryL2;
  cycles += tasks * tiles * kTask + tiles * blocks * kTile;
  cycles += source_patches * (patch_pixels * lines_per_pixel * kSourceLine +
                              static_cast<double>(p.phases_h) * (patch_h + halo_h) * kSourceRun);
  cycles += dest_channels * (pixels * static_cast<double>(groups) * dest_lines_per_pixel * kDestLine +
                             static_cast<double>(boxes * bundles) * patch_h * kDestRun);
  if (static_cast<double>(t.blocks) * vector_bytes < kLineBytes && p.batch > p.lanes) {
    cycles += tasks * tiles * tile_vectors * kHalfLine;
  }
  if (p.weight_grad) {
    cycles += tasks * tiles * tile_vectors * kLoad + revisits * dest_vectors * dest * kLoadL3 + entries * tiles * kSum;
  } else {
    cycles += revisits * dest_vectors * kReload;
  }
  if (p.batch % (static_cast<std::int64_t>(t.blocks) * p.lanes) != 0) {
    // The last lane group goes through a staging patch: packed or unpacked, like the source.
    cycles += pixels * dest_channels * dest_lines_per_pixel * kSourceLine;
  }
  return cycles;
}

// 1, 2, 4, 8, ... below `most`, then `most` itself.
std::vector<std::int64_t> powers_up_to(std::int64_t most) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 1; size < most; size *= 2) sizes.push_back(size);
  sizes.push_back(most);
  return sizes;
}

// The largest tile after a cut into equal parts no larger than `size`.
std::int64_t balanced_size(std::int64_t extent, std::int64_t size) {
  return ceil_div(extent, ceil_div(extent, size));
}

}  // namespace

Tiling choose_tiling(const TilingProblem& problem) {
  const Costs costs(problem);
  const std::int64_t batch_vectors = ceil_div(problem.batch, problem.lanes);
  const int accumulators = problem.accumulators;
  Tiling best;
  best.cycles = std::numeric_limits<double>::infinity();

  // All source channels at once, or blocks whose windows stay in L1 or little beyond it.
  const auto channel_blocks = [&](std::int64_t blocks, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t kWorthTrying[] = {12, 20, 32, 48, 80};  // KiB
    const std::int64_t all = std::max<std::int64_t>(1, problem.source_channels);
    const std::int64_t channel_bytes = (rows + problem.halo_h) * (columns + problem.halo_w) * problem.phases_h *
                                       problem.phases_w * blocks * problem.lanes * problem.element_size;
    std::vector<std::int64_t> sizes;
    for (const std::int64_t kib : kWorthTrying) {
      const std::int64_t fitting = kib * 1024 / channel_bytes;
      if (fitting < 1 || fitting >= all) continue;
      const std::int64_t size = balanced_size(all, fitting);
      if (sizes.empty() || sizes.back() != size) sizes.push_back(size);
    }
    sizes.push_back(all);
    return sizes;
  };
  const auto consider = [&](std::int64_t blocks, std::int64_t most_rows, std::int64_t most_columns) {
    const std::int64_t rows = balanced_size(problem.grid_h, most_rows);
    const std::int64_t columns = balanced_size(problem.grid_w, most_columns);
    const std::int64_t down = ceil_div(problem.grid_h, rows);
    const std::int64_t across = ceil_div(problem.grid_w, columns);
    const std::int64_t lane_groups = ceil_div(batch_vectors, blocks);
    const std::vector<std::int64_t> sizes = channel_blocks(blocks, rows, columns);
    for (const std::int64_t most_groups : powers_up_to(std::min<std::int64_t>(lane_groups, 8))) {
      const std::int64_t groups = balanced_size(lane_groups, most_groups);
      // Units of less than a cache line would fetch and dirty every line twice.
      if (groups < lane_groups && static_cast<double>(groups * blocks) * costs.vector_bytes < kLineBytes) continue;
      for (const std::int64_t patch_rows : powers_up_to(std::min<std::int64_t>(down, 8))) {
        for (const std::int64_t patch_columns : powers_up_to(std::min<std::int64_t>(across, 8))) {
          for (const std::int64_t channel_block : sizes) {
            Tiling tiling{static_cast<int>(blocks), static_cast<int>(groups), rows, columns, patch_rows, patch_columns,
                          channel_block, 0};
            if (groups > 1 && costs.packed_bytes(tiling) > kMostPackedBytes) break;  // larger blocks are larger still
            tiling.cycles = costs.cycles(tiling);
            if (tiling.cycles < best.cycles) best = tiling;
          }
        }
      }
    }
  };
  const std::int64_t most_blocks = std::min<std::int64_t>(batch_vectors, accumulators);
  for (std::int64_t blocks = 1; blocks <= most_blocks; ++blocks) {
    // More blocks than four pay only where there are few pixels to share a register tile.
    if (blocks > 4 && problem.grid_h * problem.grid_w > 4) break;
    for (std::int64_t rows = 1; rows <= std::min<std::int64_t>(problem.grid_h, kMaxTileRows); ++rows) {
      const std::int64_t most_columns = std::min<std::int64_t>(problem.grid_w, accumulators / (rows * blocks));
      if (most_columns < 1) break;
      consider(blocks, rows, most_columns);
      // The next width that cuts the grid into another number of tiles.
      const std::int64_t narrower = ceil_div(problem.grid_w, ceil_div(problem.grid_w, most_columns) + 1);
      if (narrower < most_columns && rows * narrower * blocks * 2 >= accumulators) consider(blocks, rows, narrower);
    }
  }
  return best;
}

}  // namespace fedpai
