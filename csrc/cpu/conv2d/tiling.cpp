// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/tiling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/partition.h"

namespace fedpai {

namespace {

// Cycles, on a core with two loads, one store and two FMAs per cycle; fitted to timings of random tilings, those of panels
// partly by hand (lab/001_tiling_model).
struct Constants {
  double fma;          // per vector and value, operand in L1; with the loads and the loop around it
  double fetch_l2;     // more, per vector and entry, when a packed vector has to come from L2 again
  double fetch_l3;     // the same from further away
  double entry_l2;     // per entry and tile, when the entries come from L2
  double task;         // per panel and tile: the loop exit is mispredicted
  double reload;       // per dest vector and task after the first channel block: load and store again
  double reload_l3;    // more, when a unit's dest leaves L2 between channel blocks
  double load;         // per dest vector and task of a weight gradient
  double load_l3;      // more, as above
  double sum;          // per value and tile of a weight gradient: fold its lanes, read and write its sum
  double half_line;    // per dest vector and task, when lane groups share a cache line
  double source_line;  // per cache line that packing reads
  double dest_line;    // per cache line of the dest
  double source_run;   // per row of a channel's patch: the prefetcher starts anew
  double dest_run;     // the same in the dest
  double split;        // per dest row of a strip and task: lines that the next strip shares have left the caches by then
  double tile;         // per register tile and channel block: a call, cold predictors
  double window_l3;    // per vector of a strip's window, when the patch has left L2 since it was packed
  double packed_l3;    // per cache line that packing writes, when the unit leaves L2
  double hop;          // per dest pixel and task, where other lane groups lie between a row's pixels
};

constexpr Constants kRows{0.92, 0.12, 0.62, 0.47, 11.0, 2.7, 0, 2.0, 0.2, 0.5, 1.0, 7.3, 15.9, 53.0, 14.4, 0, 1200.0, 0, 0, 0};
constexpr Constants kPanels{0.66, 0.22, 1.25, 0.5, 10.4, 0.6, 0.15, 0, 0, 0, 0.34, 2.8, 7.2, 87.0, 4.8, 21.0, 4.9, 1.2, 1.5, 14.0};
constexpr Constants kPanelGrads{0.70, 0.15, 0.7, 2.0, 50.0, 0, 0, 0.8, 0.3, 1.0, 1.6, 1.6, 14.0, 165.0, 220.0, 0, 40.0, 0.2, 1.2, 10.0};

// Sums that must be in flight for the FMAs not to wait for each other.
constexpr double kChains = 8.0;

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
  const Constants& k;
  double vector_bytes, taps_per_pair;
  double values, entries, panels;  // walked; single rows are panels of one

  explicit Costs(const TilingProblem& problem)
      : p(problem),
        k(problem.height == 1 ? kRows : problem.weight_grad ? kPanelGrads : kPanels),
        vector_bytes(static_cast<double>(p.element_size * p.lanes)),
        values(static_cast<double>(p.entries)),
        entries(values),
        panels(static_cast<double>(p.dest_channels)) {
    // A packed vector that left L1 is fetched once for all the taps of a channel pair that are next to each other.
    const auto pairs = static_cast<double>(p.dest_channels * std::max<std::int64_t>(1, p.source_channels));
    const double taps = std::max(1e-6, static_cast<double>(p.entries) / pairs);
    taps_per_pair = std::max(1.0, 0.65 * taps / (1.0 - std::exp(-taps)));
    if (p.height == 1) return;
    values = entries = panels = 0;
    for (int h = 1; h <= kMaxPanelHeight; ++h) {
      values += static_cast<double>(h * p.panel_entries[h - 1]);
      entries += static_cast<double>(p.panel_entries[h - 1]);
      panels += static_cast<double>(p.panels[h - 1]);
    }
  }

  // How often the products of all panels take `fma`: more where so few sums are in flight that each waits for itself.
  double products(double vectors) const {
    if (p.weight_grad) return values;
    double sum = 0;
    for (int h = 1; h <= kMaxPanelHeight; ++h) {
      const double walked = p.height == 1 ? (h == 1 ? values : 0) : static_cast<double>(h * p.panel_entries[h - 1]);
      sum += walked * std::max(1.0, kChains / (h * vectors));
    }
    return sum;
  }

  double cycles(const Tiling& t) const;

  bool splits_rows(std::int64_t units) const {
    if (!p.weight_grad) return sums_split_rows(units, p.threads);
    return gradient_splits_rows(units, p.threads, static_cast<std::int64_t>(values) * p.element_size, p.dest_channels);
  }

  // Of a unit, without its halo.
  double packed_bytes(const Tiling& t) const {
    return vector_bytes * static_cast<double>(p.phases_h * p.phases_w) *
           static_cast<double>(t.blocks * t.groups * t.channel_block) *
           static_cast<double>(std::min(p.grid_h, t.tile_rows * t.patch_rows)) *
           static_cast<double>(std::min(p.grid_w, t.patch_width));
  }
};

double Costs::cycles(const Tiling& t) const {
  const std::int64_t rows = ceil_div(p.grid_h, t.tile_rows), across = ceil_div(p.grid_w, t.patch_width);
  const std::int64_t tiles_across = ceil_div(std::min(p.grid_w, t.patch_width) * t.blocks, t.tile_run);
  const std::int64_t groups = ceil_div(p.batch, static_cast<std::int64_t>(t.blocks) * p.lanes);
  const std::int64_t boxes = ceil_div(rows, t.patch_rows) * across;
  const std::int64_t packed_groups = groups_per_unit(t.groups, groups, boxes, p.threads);
  const std::int64_t bundles = ceil_div(groups, packed_groups);
  const auto tiles = static_cast<double>(rows * across * tiles_across * groups);
  const auto strips = static_cast<double>(rows * across * ceil_div(tiles_across, t.strip) * groups);
  const auto blocks = static_cast<double>(std::max<std::int64_t>(1, ceil_div(p.source_channels, t.channel_block)));
  const auto dest_channels = static_cast<double>(p.dest_channels);
  const auto pixels = static_cast<double>(p.grid_h * p.grid_w);
  const double dest_vectors = pixels * static_cast<double>(groups * t.blocks);
  const double tile_vectors = dest_vectors / tiles;

  const auto phases = static_cast<double>(p.phases_h * p.phases_w);
  const auto patch_h = static_cast<double>(std::min(p.grid_h, t.tile_rows * t.patch_rows));
  const auto patch_w = static_cast<double>(std::min(p.grid_w, t.patch_width));
  const auto halo_h = static_cast<double>(p.halo_h), halo_w = static_cast<double>(p.halo_w);
  const double patch_pixels = phases * (patch_h + halo_h) * (patch_w + halo_w);
  // The runs of a strip, shifted by every tap: they join where they are no shorter than a pixel.
  const double tile_run = static_cast<double>(t.tile_run * t.strip), pixel = static_cast<double>(t.blocks);
  const double tile_vectors_read =
      phases * (static_cast<double>(t.tile_rows) + halo_h) * (tile_run + halo_w * std::min(tile_run, pixel));

  // What is walked again: a tile's window and the block's entries for every dest channel, a patch for every tile, and
  // a unit's dest for every channel block.
  const double block_vector_bytes = static_cast<double>(t.channel_block * t.blocks) * vector_bytes;
  const double block_entry_bytes = (4.0 * entries + static_cast<double>(p.element_size) * values) / blocks;
  const double window_bytes = tile_vectors_read * static_cast<double>(t.channel_block) * vector_bytes;
  const double window = spilled_l1(window_bytes + 0.5 * block_entry_bytes);
  // A strip of panels fetches its window but once from where the patch is.
  const double patch_bytes = p.height > 1 && !p.weight_grad ? window_bytes : patch_pixels * block_vector_bytes;
  const double patch = spilled_l2(patch_bytes + block_entry_bytes);
  const double dest =
      spilled_l2(patch_h * patch_w * dest_channels * static_cast<double>(t.blocks * t.groups) * vector_bytes);

  // The first channel block visits every panel, later ones those with entries in it.
  const double revisits = panels * (blocks - 1.0) * (1.0 - std::exp(-entries / (panels * blocks)));
  const double tasks = panels + revisits, rows_per_task = dest_channels / panels;

  const double lines_per_pixel =
      std::max(1.0, static_cast<double>(t.blocks * packed_groups) * vector_bytes / kLineBytes);
  const double dest_lines_per_pixel = std::max(1.0, static_cast<double>(t.blocks) * vector_bytes / kLineBytes);
  const auto source_patches = static_cast<double>(p.source_channels * boxes * bundles);

  double cycles = dest_vectors * (products(tile_vectors) * k.fma + entries * window / taps_per_pair *
                                                                       ((1.0 - patch) * k.fetch_l2 + patch * k.fetch_l3));
  cycles += entries * tiles * spilled_l1(block_entry_bytes) * k.entry_l2;
  cycles += tasks * tiles * k.task + tiles * blocks * k.tile;
  cycles += tasks * rows_per_task * strips * k.split;
  const double left = spilled_l2(patch_pixels * block_vector_bytes);
  cycles += strips * blocks * tile_vectors_read * static_cast<double>(t.channel_block) * left * k.window_l3;
  const double unit_left = spilled_l2(patch_pixels * block_vector_bytes * static_cast<double>(packed_groups));
  const double packing = source_patches * (patch_pixels * lines_per_pixel * (k.source_line + unit_left * k.packed_l3) +
                                           static_cast<double>(p.phases_h) * (patch_h + halo_h) * k.source_run);
  cycles += dest_channels * (pixels * static_cast<double>(groups) * dest_lines_per_pixel * k.dest_line +
                             static_cast<double>(boxes * (p.height == 1 ? bundles : groups)) * patch_h * k.dest_run);
  if (static_cast<double>(t.blocks) * vector_bytes < kLineBytes && p.batch > p.lanes) {
    cycles += tasks * rows_per_task * dest_vectors * k.half_line;
  }
  if (groups > 1) cycles += tasks * rows_per_task * pixels * static_cast<double>(groups) * k.hop;
  if (p.weight_grad) {
    cycles += rows_per_task * dest_vectors * (tasks * k.load + revisits * dest * k.load_l3) + values * tiles * k.sum;
  } else {
    cycles += rows_per_task * revisits * dest_vectors * (k.reload + dest * k.reload_l3);
  }
  if (p.batch % (static_cast<std::int64_t>(t.blocks) * p.lanes) != 0) {
    // The last lane group goes through a staging patch: packed or unpacked, like the source.
    cycles += pixels * dest_channels * dest_lines_per_pixel * k.source_line;
  }
  const double threads = p.threads, units = static_cast<double>(bundles * boxes);
  if (splits_rows(bundles * boxes)) return cycles + threads * packing;
  return (cycles + packing) * std::ceil(units / threads) * threads / units;
}

// 1, 2, 4, 8, ... below `most`, then `most` itself.
std::vector<std::int64_t> powers_up_to(std::int64_t most) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 1; size < most; size *= 2) sizes.push_back(size);
  sizes.push_back(most);
  return sizes;
}

// Vectors of images that a lane group may have.
std::vector<std::int64_t> lane_groups(std::int64_t batch_vectors) {
  constexpr std::int64_t kMost = 32;
  std::vector<std::int64_t> sizes;
  for (const std::int64_t size : {1, 2, 3, 4, 8, 16}) {
    if (size < std::min(batch_vectors, kMost)) sizes.push_back(size);
  }
  sizes.push_back(std::min(batch_vectors, kMost));
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
  Tiling best;
  best.cycles = std::numeric_limits<double>::infinity();

  // A panel's weight gradient has its sums in registers and walks a patch as one tile.
  const bool whole_patches = problem.height > 1 && problem.weight_grad;
  // All source channels at once, or blocks whose windows stay in L1 or little beyond it; those of a strip, which are read
  // in long runs, in L2.
  const auto channel_blocks = [&](std::int64_t rows, std::int64_t tile_run, std::int64_t strip, double blocks) {
    const auto run = static_cast<double>(tile_run * strip);
    constexpr double kWorthTrying[] = {12, 24, 48, 96, 192, 384, 768};  // KiB
    constexpr double kMostOfOneTile = 100;
    const std::int64_t all = std::max<std::int64_t>(1, problem.source_channels);
    const double channel_bytes = static_cast<double>((rows + problem.halo_h) * problem.phases_h * problem.phases_w) *
                                 (run + static_cast<double>(problem.halo_w) * std::min(run, blocks)) * costs.vector_bytes;
    std::vector<std::int64_t> sizes;
    for (const double kib : kWorthTrying) {
      if (strip == 1 && !whole_patches && kib > kMostOfOneTile) break;
      const double fitting = kib * 1024 / channel_bytes;
      if (fitting < 1 || fitting >= static_cast<double>(all)) continue;
      const std::int64_t size = balanced_size(all, static_cast<std::int64_t>(fitting));
      if (sizes.empty() || sizes.back() != size) sizes.push_back(size);
    }
    sizes.push_back(all);
    return sizes;
  };
  const auto consider = [&](std::int64_t blocks, std::int64_t groups, std::int64_t most_rows, std::int64_t width,
                            std::int64_t most_run, std::int64_t strip) {
    const std::int64_t rows = balanced_size(problem.grid_h, most_rows);
    const std::int64_t run = balanced_size(width * blocks, most_run);
    const std::vector<std::int64_t> sizes = channel_blocks(rows, run, strip, static_cast<double>(blocks));
    for (const std::int64_t patch_rows : powers_up_to(std::min<std::int64_t>(ceil_div(problem.grid_h, rows), 8))) {
      for (const std::int64_t channel_block : sizes) {
        Tiling tiling{static_cast<int>(blocks), static_cast<int>(groups), rows, run, patch_rows, width,
                      channel_block, strip, problem.height, 0};
        if (groups > 1 && costs.packed_bytes(tiling) > kMostPackedBytes) break;  // larger blocks are larger still
        tiling.cycles = costs.cycles(tiling);
        if (tiling.cycles < best.cycles) best = tiling;
      }
    }
  };
  const std::int64_t vectors = std::max(1, problem.accumulators / problem.height);
  for (const std::int64_t blocks : lane_groups(batch_vectors)) {
    const std::int64_t lane_groups = ceil_div(batch_vectors, blocks);
    for (const std::int64_t most_groups : powers_up_to(std::min<std::int64_t>(lane_groups, 8))) {
      const std::int64_t groups = balanced_size(lane_groups, most_groups);
      // Units of less than a cache line would fetch and dirty every line twice.
      if (groups < lane_groups && static_cast<double>(groups * blocks) * costs.vector_bytes < kLineBytes) continue;
      for (const std::int64_t parts : {1, 2, 4}) {
        if (parts > problem.grid_w) break;
        const std::int64_t width = ceil_div(problem.grid_w, parts);
        const std::int64_t most_rows = whole_patches ? 8 : problem.height > 1 ? 1 : kMaxTileRows;
        for (std::int64_t rows = 1; rows <= std::min(problem.grid_h, most_rows); ++rows) {
          if (whole_patches && (rows & (rows - 1)) != 0 && rows != problem.grid_h) continue;
          if (!whole_patches && rows > vectors) break;
          consider(blocks, groups, rows, width, whole_patches ? width * blocks : vectors / rows, 1);
          if (problem.height == 1 || whole_patches) continue;
          for (const std::int64_t strip : {4, 16}) consider(blocks, groups, rows, width, vectors / rows, strip);
        }
      }
    }
  }
  return best;
}

}  // namespace fedpai
