// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/tiled_schedule.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "cpu/conv2d/partition.h"

namespace fedpai {

namespace {

// From here on it pays to wake the other threads.
constexpr std::int64_t kParallelEntries = 30000;

constexpr std::int64_t kLineBytes = 64;

// The packed positions depend on the patch, so this runs after the tiling is chosen; before that, residues and halos
// are known and slots is zero.
void find_residues(TiledAxis& axis) {
  axis.tap_slot.assign(axis.shift.size(), -1);
  if (!axis.any_tap()) return;
  axis.first_shift = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t shift : axis.shift) {
    if (shift != Axis::kNoTap) axis.first_shift = std::min(axis.first_shift, shift);
  }
  for (const std::int64_t shift : axis.shift) {
    if (shift == Axis::kNoTap) continue;
    const std::int64_t residue = (shift - axis.first_shift) % axis.source_step;
    const std::int64_t reach = (shift - axis.first_shift) / axis.source_step;
    auto found = std::find_if(axis.residues.begin(), axis.residues.end(),
                              [&](const TiledAxis::Residue& r) { return r.residue == residue; });
    if (found == axis.residues.end()) axis.residues.push_back({residue, reach, 0});
    else found->halo = std::max(found->halo, reach);
  }
}

void place_slots(TiledAxis& axis, std::int64_t tile, std::int64_t tiles_per_patch) {
  axis.cuts = balanced_cuts(axis.grid, tile);
  const std::int64_t tiles = static_cast<std::int64_t>(axis.cuts.size()) - 1;
  axis.patch_cuts = balanced_cuts(tiles, tiles_per_patch);
  std::int64_t extent = 0;
  for (std::size_t i = 0; i + 1 < axis.patch_cuts.size(); ++i) {
    extent = std::max(extent, axis.cuts[static_cast<std::size_t>(axis.patch_cuts[i + 1])] -
                                  axis.cuts[static_cast<std::size_t>(axis.patch_cuts[i])]);
  }
  axis.slots = 0;
  for (TiledAxis::Residue& residue : axis.residues) {
    residue.slot = axis.slots;
    axis.slots += extent + residue.halo;
  }
  for (std::size_t k = 0; k < axis.shift.size(); ++k) {
    if (axis.shift[k] == Axis::kNoTap) continue;
    const std::int64_t distance = axis.shift[k] - axis.first_shift;
    for (const TiledAxis::Residue& residue : axis.residues) {
      if (residue.residue == distance % axis.source_step) axis.tap_slot[k] = residue.slot + distance / axis.source_step;
    }
  }
}

std::int64_t largest_halo(const TiledAxis& axis) {
  std::int64_t halo = 0;
  for (const TiledAxis::Residue& residue : axis.residues) halo = std::max(halo, residue.halo);
  return halo;
}

// Whether each kernel tap belongs to the pass.
std::vector<char> kept_taps(const PassAxes& axes) {
  std::vector<char> kept;
  for (const std::int64_t y : axes.y.shift) {
    for (const std::int64_t x : axes.x.shift) kept.push_back(y != Axis::kNoTap && x != Axis::kNoTap);
  }
  return kept;
}

// The source channels that the pass's entries read.
struct ChannelUse {
  std::vector<char> used;
  std::int64_t channels = 0;
  std::int64_t entries = 0;
};

ChannelUse channel_use(const PassAxes& axes, const EntryList& list) {
  ChannelUse use;
  use.used.assign(static_cast<std::size_t>(list.columns), 0);
  const std::vector<char> kept = kept_taps(axes);
  const bool all_taps = std::find(kept.begin(), kept.end(), 0) == kept.end();
  for (std::size_t j = 0; j < list.column.size(); ++j) {
    if (kept[static_cast<std::size_t>(list.tap[j])] == 0) continue;
    ++use.entries;
    char& used = use.used[static_cast<std::size_t>(list.column[j])];
    use.channels += used == 0;
    used = 1;
    if (all_taps && use.channels == list.columns) break;  // nothing left to find out
  }
  if (all_taps) use.entries = list.size();
  return use;
}

// The rows of a pass, in the order of its panels.
void lay_out_rows(TiledPass& pass, const Panels& panels) {
  pass.rows = panels.rows;
  pass.panel_row_begin.assign(panels.row_begin.begin(), panels.row_begin.end());
  pass.height_begin.fill(static_cast<std::int64_t>(pass.rows.size()));
  for (std::int64_t p = panels.count() - 1; p >= 0; --p) {
    for (int height = panels.height(p); height <= kMaxPanelHeight; ++height) {
      pass.height_begin[static_cast<std::size_t>(height - 1)] = panels.row_begin[static_cast<std::size_t>(p)];
    }
  }
}

// Where each tap lies in a channel's patch; negative where the pass has no such tap.
std::vector<std::int32_t> tap_offsets(const TiledPass& pass) {
  std::vector<std::int32_t> offsets;
  for (const std::int64_t slot_y : pass.y.tap_slot) {
    for (const std::int64_t slot_x : pass.x.tap_slot) {
      const bool any = slot_y >= 0 && slot_x >= 0;
      offsets.push_back(any ? static_cast<std::int32_t>(slot_y * pass.source_row + slot_x * pass.lane_group) : -1);
    }
  }
  return offsets;
}

// Cuts the source channels in use into blocks. Per source channel: where it starts in its block's patch.
std::vector<std::int32_t> lay_out_channels(TiledPass& pass, const ChannelUse& use) {
  const std::int64_t channel_block = pass.tiling.channel_block;
  std::vector<std::int32_t> offsets(use.used.size(), 0);
  for (std::size_t c = 0; c < use.used.size(); ++c) {
    if (use.used[c] == 0) continue;
    const auto position = static_cast<std::int64_t>(pass.channels.size());
    if (position % channel_block == 0) pass.block_channel_begin.push_back(position);
    offsets[c] = static_cast<std::int32_t>(position % channel_block * pass.plane);
    pass.channels.push_back(static_cast<std::int32_t>(c));
  }
  if (pass.block_channel_begin.empty()) pass.block_channel_begin.push_back(0);
  pass.block_channel_begin.push_back(static_cast<std::int64_t>(pass.channels.size()));
  return offsets;
}

// Calls visit(block, first, last) for the entries [first, last) that a panel has in each channel block: they ascend by
// source channel. `block_end` holds the first source channel beyond each block.
template <class F>
void for_each_block(const Panels& panels, std::int64_t panel, const std::vector<std::int32_t>& block_end, F&& visit) {
  std::int32_t first = panels.entry_begin[panel];
  const std::int32_t end = panels.entry_begin[panel + 1];
  for (std::size_t b = 0; b < block_end.size(); ++b) {
    std::int32_t last = first;
    if (b + 1 == block_end.size()) last = end;
    else while (last < end && panels.column[last] < block_end[b]) ++last;
    visit(static_cast<std::int64_t>(b), first, last);
    first = last;
  }
}

// The entries of `panels` whose taps the pass has, cut into channel blocks: counted first, then every panel writes its
// own. Offsets are relative to the block's patch.
void lay_out_entries(TiledPass& pass, const PassAxes& axes, const EntryList& list, const Panels& panels) {
  const std::vector<std::int32_t> channel_offset = lay_out_channels(pass, channel_use(axes, list));
  const std::vector<std::int32_t> tap_offset = tap_offsets(pass);
  const bool all_taps = std::find(tap_offset.begin(), tap_offset.end(), -1) == tap_offset.end();
  const auto present = [&](std::int32_t entry) {
    return all_taps || tap_offset[static_cast<std::size_t>(panels.tap[entry])] >= 0;
  };
  const auto blocks = static_cast<std::int64_t>(pass.block_channel_begin.size()) - 1;
  std::vector<std::int32_t> block_end;
  for (std::int64_t b = 1; b < blocks; ++b) {
    block_end.push_back(pass.channels[static_cast<std::size_t>(pass.block_channel_begin[static_cast<std::size_t>(b)])]);
  }
  block_end.push_back(static_cast<std::int32_t>(list.columns));

  const std::int64_t count = panels.count();
  const auto at = [count](std::int64_t block, std::int64_t panel) { return static_cast<std::size_t>(block * count + panel); };
  // Per block and panel: where its entries and their values begin; one more at the end.
  std::vector<std::int32_t> begin(static_cast<std::size_t>(blocks * count) + 1, 0);
#pragma omp parallel for schedule(static) if (list.size() > kParallelEntries)
  for (std::int64_t p = 0; p < count; ++p) {
    for_each_block(panels, p, block_end, [&](std::int64_t b, std::int32_t first, std::int32_t last) {
      std::int32_t entries = last - first;
      if (!all_taps) {
        for (std::int32_t j = first; j < last; ++j) entries -= !present(j);
      }
      begin[at(b, p) + 1] = entries;
    });
  }
  std::vector<std::int32_t> value_begin(begin.size(), 0);
  std::size_t i = 1;
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t p = 0; p < count; ++p, ++i) {
      value_begin[i] = value_begin[i - 1] + begin[i] * panels.height(p);
      begin[i] += begin[i - 1];
    }
  }
  pass.order.resize(static_cast<std::size_t>(value_begin.back()));
  pass.offset.resize(static_cast<std::size_t>(begin.back()) + kOffsetsAhead);
  std::fill(pass.offset.end() - kOffsetsAhead, pass.offset.end(), 0);
#pragma omp parallel for schedule(static) if (list.size() > kParallelEntries)
  for (std::int64_t p = 0; p < count; ++p) {
    const int height = panels.height(p);
    const std::int32_t* const values = panels.value + panels.value_begin[p];
    for_each_block(panels, p, block_end, [&](std::int64_t b, std::int32_t first, std::int32_t last) {
      std::int32_t* offset = pass.offset.data() + begin[at(b, p)];
      std::int32_t* order = pass.order.data() + value_begin[at(b, p)];
      const std::int32_t* value = values + static_cast<std::int64_t>(first - panels.entry_begin[p]) * height;
      for (std::int32_t j = first; j < last; ++j, value += height) {
        if (!present(j)) continue;
        *offset++ = channel_offset[static_cast<std::size_t>(panels.column[j])] +
                    tap_offset[static_cast<std::size_t>(panels.tap[j])];
        if (height == 1) *order++ = *value;
        else order = std::copy_n(value, height, order);
      }
    });
  }
  pass.weights = pass.values() - std::count(pass.order.begin(), pass.order.end(), kNoValue);
  std::int32_t next = 0;
  pass.order_is_identity =
      std::all_of(pass.order.begin(), pass.order.end(), [&](std::int32_t value) { return value == next++; });

  for (std::int64_t b = 0; b < blocks; ++b) {
    pass.block_task_begin.push_back(static_cast<std::int64_t>(pass.tasks.size()));
    for (std::int64_t p = 0; p < count; ++p) {
      const std::int32_t first = begin[at(b, p)], last = begin[at(b, p) + 1];
      // The first block visits every dest channel, so that a channel without entries still gets its bias or zero.
      if (b > 0 && last == first) continue;
      const std::int32_t row = panels.row_begin[static_cast<std::size_t>(p)];
      pass.tasks.push_back({panels.rows[static_cast<std::size_t>(row)], row, first, last, value_begin[at(b, p)]});
    }
  }
  pass.block_task_begin.push_back(static_cast<std::int64_t>(pass.tasks.size()));
}

// First-level caches: 64 sets of 8 lines on many cores, as many sets of more lines on others.
constexpr std::int64_t kCacheSets = 64;
constexpr std::int64_t kCacheWays = 8;

// The cache lines that one channel of a register tile's window touches.
std::vector<std::int64_t> window_lines(const TiledPass& pass, std::int64_t lanes, std::int64_t line) {
  const std::int64_t run = pass.tiling.tile_run * lanes;
  std::vector<std::int64_t> lines;
  for (const TiledAxis::Residue& y : pass.y.residues) {
    for (std::int64_t row = y.slot; row < y.slot + pass.tiling.tile_rows + y.halo; ++row) {
      for (const TiledAxis::Residue& x : pass.x.residues) {
        for (std::int64_t shift = 0; shift <= x.halo; ++shift) {
          const std::int64_t begin = row * pass.source_row + (x.slot + shift) * pass.lane_group;
          for (std::int64_t l = begin / line; l * line < begin + run; ++l) lines.push_back(l);
        }
      }
    }
  }
  std::sort(lines.begin(), lines.end());
  lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
  return lines;
}

// Lines of the window that find their cache set full, where channels are `plane` lines apart.
std::int64_t crowded_lines(const std::vector<std::int64_t>& lines, std::int64_t channels, std::int64_t plane) {
  std::array<std::int64_t, kCacheSets> held{};
  std::int64_t crowded = 0;
  for (std::int64_t c = 0; c < channels; ++c) {
    for (const std::int64_t l : lines) {
      crowded += ++held[static_cast<std::size_t>((c * plane + l) % kCacheSets)] > kCacheWays;
    }
  }
  return crowded;
}

// Elements from channel to channel of a packed patch. Multiples of large powers of two would crowd the channels of a
// window into a few cache sets: up to 15 lines more, as few as crowd it least. Worth 8 to 18 % where 22 channels of
// 8 x 18 pixels are 9 KiB apart.
std::int64_t spread_plane(const TiledPass& pass, std::int64_t channels, std::int64_t lanes, std::int64_t line) {
  const std::vector<std::int64_t> lines = window_lines(pass, lanes, line);
  const auto per_channel = std::max<std::int64_t>(1, static_cast<std::int64_t>(lines.size()));  // none without taps
  // Beyond twice the cache, every choice is as bad.
  const std::int64_t counted = std::min(channels, 2 * kCacheSets * kCacheWays / per_channel + 1);
  const std::int64_t unavoidable = std::max<std::int64_t>(0, counted * per_channel - kCacheSets * kCacheWays);
  const std::int64_t needed = (pass.y.slots * pass.source_row + line - 1) / line;
  std::int64_t best = needed, fewest = crowded_lines(lines, counted, needed);
  for (std::int64_t plane = needed + 1; plane < needed + 16 && fewest > unavoidable; ++plane) {
    const std::int64_t crowded = crowded_lines(lines, counted, plane);
    if (crowded < fewest) best = plane, fewest = crowded;
  }
  return best * line;
}

TiledAxis with_residues(const Axis& axis) {
  TiledAxis result;
  static_cast<Axis&>(result) = axis;
  find_residues(result);
  return result;
}

}  // namespace

TilingProblem tiling_problem(const PassAxes& axes, const EntryList& list, std::int64_t batch, const VectorShape& vector,
                             bool weight_grad, int threads) {
  const TiledAxis y = with_residues(axes.y), x = with_residues(axes.x);
  const ChannelUse use = channel_use(axes, list);
  return {y.grid,
          x.grid,
          largest_halo(y),
          largest_halo(x),
          std::max<std::int64_t>(1, static_cast<std::int64_t>(y.residues.size())),
          std::max<std::int64_t>(1, static_cast<std::int64_t>(x.residues.size())),
          batch,
          list.rows(),
          use.channels,
          use.entries,
          vector.element_size,
          vector.lanes,
          vector.accumulators,
          weight_grad,
          axes.x.source_step == 1 && axes.x.dest_step == 1,
          threads};
}

TiledPass tiled_pass(const PassAxes& axes, const EntryList& list, const VectorShape& vector, const Tiling& tiling) {
  TiledPass pass;
  pass.y = with_residues(axes.y);
  pass.x = with_residues(axes.x);
  pass.tiling = tiling;
  place_slots(pass.y, tiling.tile_rows, tiling.patch_rows);
  place_slots(pass.x, tiling.patch_width, 1);
  pass.dest_channels = list.rows();
  pass.lane_group = static_cast<std::int64_t>(tiling.blocks) * vector.lanes;
  pass.source_row = pass.x.slots * pass.lane_group;
  // In double: the product may exceed 64 bits.
  if ((static_cast<double>(pass.y.slots) * static_cast<double>(pass.source_row) + 16 * kLineBytes) *
          static_cast<double>(tiling.channel_block) >
      std::numeric_limits<std::int32_t>::max()) {
    throw std::length_error("input: one patch of the image exceeds 2^31 - 1 elements");
  }
  const std::int64_t line = kLineBytes / vector.element_size;
  const std::int64_t channels = std::min<std::int64_t>(tiling.channel_block, list.columns);
  pass.plane = spread_plane(pass, channels, vector.lanes, line);
  // Packing writes all lane groups at once: an odd number of cache lines apart, or their lines fall into the same cache
  // sets.
  const std::int64_t lines = (pass.plane * channels + line - 1) / line;
  pass.group = (lines | 1) * line;
  const Panels panels(list, tiling.height);
  lay_out_rows(pass, panels);
  lay_out_entries(pass, axes, list, panels);
  return pass;
}

Tiling choose_tiling(const TilingProblem& problem, const EntryList& list, const VectorShape& vector) {
  constexpr double kWorthPanels = 0.1;  // of the weights in groups of rows
  Tiling best = choose_tiling(problem);
  const RowGroups& groups = list.groups;
  if (static_cast<double>(groups.shared) < kWorthPanels * static_cast<double>(list.size())) return best;
  TilingProblem panels = problem;
  panels.height = static_cast<int>(std::min<std::int64_t>(kMaxPanelHeight, groups.largest));
  panels.accumulators = vector.panel;
  const PanelCounts counts = count_panels(list, panels.height);
  // Of the taps that the pass has.
  const double share = static_cast<double>(problem.entries) / static_cast<double>(std::max<std::int64_t>(1, list.size()));
  for (int h = 0; h < kMaxPanelHeight; ++h) {
    panels.panels[h] = counts.panels[h];
    panels.panel_entries[h] = static_cast<std::int64_t>(share * static_cast<double>(counts.entries[h]));
  }
  const Tiling tiling = choose_tiling(panels);
  return tiling.cycles < best.cycles ? tiling : best;
}

}  // namespace fedpai
