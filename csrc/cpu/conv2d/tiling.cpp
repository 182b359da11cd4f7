// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/tiling.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/conv2d/kernels.h"

namespace fedpai {

namespace {

// Cycles, on a core with two loads, one store and two FMAs per cycle; fitted to timings of random tilings.
constexpr double kFma = 0.62;         // per vector, operand in L1
constexpr double kFetchL2 = 0.35;     // more, when a packed vector has to come from L2 again
constexpr double kFetchL3 = 0.8;      // the same from further away
constexpr double kEntry = 1.4;        // index load, broadcast, loop
constexpr double kTask = 8.0;         // the loop exit is mispredicted once per row
constexpr double kStore = 1.5;        // per dest vector and task
constexpr double kReload = 1.0;       // per dest vector and task after the first channel block
constexpr double kDestMiss = 5.0;     // more, when a patch's dest leaves L2 between channel blocks
constexpr double kSum = 3.0;          // per entry and tile: add its lanes, read and write its sum in L1
constexpr double kSumFromL2 = 3.5;    // the same in L2 or beyond
constexpr double kPack = 3.0;         // per packed vector
constexpr double kSourceLine = 4.0;   // per cache line of the source that a patch reads
constexpr double kDestLine = 4.0;     // per cache line of the dest that a patch writes (or reads, for its gradient)
constexpr double kPage = 22.0;        // per page that a patch touches in a tensor beyond the TLB's reach
constexpr double kPatch = 300.0;      // per patch: segments, calls
constexpr double kTile = 200.0;       // per register tile: one call, cold predictors

constexpr double kPageBytes = 4096;
constexpr double kTlbBytes = 8e6;     // 2048 pages
constexpr double kL1Bytes = 26 * 1024;
constexpr double kL2Bytes = 320 * 1024;
constexpr double kLineBytes = 64;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

double estimate(const TilingProblem& p, const Tiling& t) {
  const double vector_bytes = static_cast<double>(p.element_size * p.lanes);
  const std::int64_t rows = ceil_div(p.grid_h, t.tile_rows);
  const std::int64_t columns = ceil_div(p.grid_w, t.tile_columns);
  const std::int64_t groups = ceil_div(p.batch, static_cast<std::int64_t>(t.blocks) * p.lanes);
  const std::int64_t tiles = rows * columns * groups;
  const std::int64_t patches = ceil_div(rows, t.patch_rows) * ceil_div(columns, t.patch_columns) * groups;
  const std::int64_t channel_blocks = ceil_div(p.source_channels, t.channel_block);
  const double dest_vectors = static_cast<double>(p.grid_h * p.grid_w * groups * t.blocks);

  const double tile_pixels = static_cast<double>((t.tile_rows + p.halo_h) * (t.tile_columns + p.halo_w));
  const double patch_h = static_cast<double>(std::min(p.grid_h, t.tile_rows * t.patch_rows));
  const double patch_w = static_cast<double>(std::min(p.grid_w, t.tile_columns * t.patch_columns));
  const double patch_pixels = static_cast<double>(p.phases_h * p.phases_w) * (patch_h + static_cast<double>(p.halo_h)) *
                              (patch_w + static_cast<double>(p.halo_w));
  const double packed_vectors = patch_pixels * t.blocks * static_cast<double>(p.source_channels * patches);

  // Where the operand of an FMA comes from: the packed pixels that one tile revisits for every dest channel.
  const double tile_bytes =
      tile_pixels * static_cast<double>(p.phases_h * p.phases_w * t.channel_block) * t.blocks * vector_bytes;
  const double patch_bytes = patch_pixels * static_cast<double>(t.channel_block) * t.blocks * vector_bytes;
  const double entries = static_cast<double>(p.entries);
  const double tasks_per_block =
      std::min(static_cast<double>(p.dest_channels), entries / static_cast<double>(channel_blocks) + 1.0);
  const double tasks = channel_blocks == 1 ? static_cast<double>(p.dest_channels)
                                           : tasks_per_block * static_cast<double>(channel_blocks);

  // A packed vector that left L1 is fetched once for all the taps of a channel pair that are next to each other.
  const double taps_per_pair =
      std::max(1.0, 0.7 * entries / static_cast<double>(p.dest_channels * std::max<std::int64_t>(1, p.source_channels)));
  double fma = kFma;
  if (tile_bytes > kL1Bytes) fma += (patch_bytes <= kL2Bytes ? kFetchL2 : kFetchL3) / taps_per_pair;

  const double group_bytes = vector_bytes * t.blocks;
  const double lines_per_pixel = std::max(1.0, group_bytes / kLineBytes);
  const double source_lines = packed_vectors / t.blocks * lines_per_pixel;
  // The weight gradient passes by all patches once per channel block.
  const double dest_rounds = p.weight_grad ? static_cast<double>(channel_blocks) : 1.0;
  const double dest_lines =
      static_cast<double>(p.grid_h * p.grid_w * groups * p.dest_channels) * lines_per_pixel * dest_rounds;
  const double dest_bytes = patch_h * patch_w * static_cast<double>(p.dest_channels) * lines_per_pixel * kLineBytes;

  // In batch-last storage a row of a patch is one run of the image row; runs shorter than a page waste most of it.
  const double pixel_bytes = static_cast<double>(p.batch * p.element_size);
  const double source_pages = static_cast<double>(p.source_channels * patches) * static_cast<double>(p.phases_h) *
                              (patch_h + static_cast<double>(p.halo_h)) *
                              (1.0 + (patch_w + static_cast<double>(p.halo_w)) *
                                         static_cast<double>(p.phases_w) * pixel_bytes / kPageBytes);
  const double dest_pages = static_cast<double>(p.dest_channels * patches) * dest_rounds * patch_h *
                            (1.0 + patch_w * pixel_bytes / kPageBytes);
  const double dest_tensor = static_cast<double>(p.dest_channels * p.grid_h * p.grid_w) * pixel_bytes;
  const double source_tensor =
      static_cast<double>(p.source_channels * p.grid_h * p.phases_h * p.grid_w * p.phases_w) * pixel_bytes;
  const double pages =
      (source_tensor > kTlbBytes ? source_pages : 0.0) + (dest_tensor > kTlbBytes ? dest_pages : 0.0);

  double cycles = pages * kPage + source_lines * kSourceLine + dest_lines * kDestLine + entries * dest_vectors * fma + entries * static_cast<double>(tiles) * kEntry +
                  packed_vectors * kPack + static_cast<double>(patches * channel_blocks) * kPatch +
                  static_cast<double>(tiles * channel_blocks) * kTile + tasks * static_cast<double>(tiles) * kTask;
  const double tile_vectors = dest_vectors / static_cast<double>(tiles);
  if (p.batch % (static_cast<std::int64_t>(t.blocks) * p.lanes) != 0) {
    // The last lane group goes through a staging patch: packed or unpacked, like the source.
    cycles += static_cast<double>(p.grid_h * p.grid_w * p.dest_channels * t.blocks) * dest_rounds * kPack;
  }
  if (p.weight_grad) {
    const double sum_bytes = entries / static_cast<double>(channel_blocks) * static_cast<double>(p.element_size);
    cycles += entries * static_cast<double>(tiles) * (sum_bytes + tile_bytes <= kL1Bytes ? kSum : kSumFromL2);
    cycles += tasks * static_cast<double>(tiles) * tile_vectors * kReload;
  } else {
    cycles += tasks * static_cast<double>(tiles) * tile_vectors * kStore;
    cycles += (tasks - static_cast<double>(p.dest_channels)) * static_cast<double>(tiles) * tile_vectors *
              (kReload + (dest_bytes > kL2Bytes ? kDestMiss : 0.0));
  }
  return cycles;
}

// 1, 2, 3, 4, 6, 8, 12, ... below `most`, then `most` itself.
std::vector<std::int64_t> sizes_up_to(std::int64_t most) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 1; size < most; size *= 2) {
    sizes.push_back(size);
    if (size >= 2 && size / 2 * 3 < most) sizes.push_back(size / 2 * 3);
  }
  sizes.push_back(most);
  return sizes;
}

// The largest tile after a cut into equal parts no larger than `size`.
std::int64_t balanced_size(std::int64_t extent, std::int64_t size) {
  return ceil_div(extent, ceil_div(extent, size));
}

}  // namespace

Tiling choose_tiling(const TilingProblem& problem) {
  const std::int64_t batch_vectors = ceil_div(problem.batch, problem.lanes);
  const int accumulators = problem.accumulators;
  Tiling best;
  best.cycles = std::numeric_limits<double>::infinity();
  const std::vector<std::int64_t> channel_blocks = sizes_up_to(std::max<std::int64_t>(1, problem.source_channels));

  const auto consider = [&](std::int64_t blocks, std::int64_t most_rows, std::int64_t most_columns) {
    const std::int64_t rows = balanced_size(problem.grid_h, most_rows);
    const std::int64_t columns = balanced_size(problem.grid_w, most_columns);
    const std::int64_t down = ceil_div(problem.grid_h, rows);
    const std::int64_t across = ceil_div(problem.grid_w, columns);
    for (const std::int64_t patch_rows : sizes_up_to(std::min<std::int64_t>(down, 8))) {
      for (const std::int64_t patch_columns : sizes_up_to(std::min<std::int64_t>(across, 8))) {
        for (const std::int64_t channel_block : channel_blocks) {
          Tiling tiling{static_cast<int>(blocks), rows, columns, patch_rows, patch_columns, channel_block, 0};
          tiling.cycles = estimate(problem, tiling);
          if (tiling.cycles < best.cycles) best = tiling;
        }
      }
    }
  };
  const std::int64_t most_blocks = std::min<std::int64_t>(batch_vectors, accumulators);
  // A lane group narrower than a cache line would fetch and dirty every line twice.
  const std::int64_t line_blocks = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(kLineBytes) / (problem.element_size * problem.lanes));
  for (std::int64_t blocks = std::min(line_blocks, most_blocks); blocks <= most_blocks; ++blocks) {
    // More blocks than four pay only where there are few pixels to share a register tile.
    if (blocks > 4 && problem.grid_h * problem.grid_w > 4) break;
    for (std::int64_t rows = 1; rows <= std::min<std::int64_t>(problem.grid_h, kMaxTileRows); ++rows) {
      const std::int64_t most_columns = std::min<std::int64_t>(problem.grid_w, accumulators / (rows * blocks));
      if (most_columns < 1) break;
      // Only widths that give another number of tiles matter: the cut is balanced.
      std::int64_t last_across = -1;
      for (std::int64_t columns = most_columns; columns >= 1 && rows * columns * blocks * 3 >= accumulators; --columns) {
        const std::int64_t across = ceil_div(problem.grid_w, columns);
        if (across == last_across) continue;
        last_across = across;
        consider(blocks, rows, columns);
      }
      consider(blocks, rows, most_columns);
    }
  }
  return best;
}

}  // namespace fedpai
