// SPDX-License-Identifier: Apache-2.0
// The pieces that both directions of the convolution share: where patches lie, how they are packed, and how the register
// tiles of a patch address the dest.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/conv2d/conv2d.h"
#include "cpu/conv2d/partition.h"
#include "cpu/conv2d/tiled_schedule.h"

namespace fedpai {

// Bytes. Registers, cache lines and the widest vector all divide it.
constexpr std::int64_t kScratchAlignment = 64;

template <class T>
std::int64_t aligned_elements(std::int64_t count) {
  const auto unit = kScratchAlignment / static_cast<std::int64_t>(sizeof(T));
  return (count + unit - 1) / unit * unit;
}

// The grid rectangle of one patch.
struct PatchBox {
  std::int64_t tile_y_begin, tile_y_end;  // register tiles
  std::int64_t tile_x_begin, tile_x_end;
  std::int64_t y, x, height, width;  // pixels
};

PatchBox patch_box(const TiledPass& pass, std::int64_t patch);

// The pixels of the largest patch.
std::int64_t largest_patch_pixels(const TiledPass& pass);

// The work is cut into units: one patch of up to `Tiling::groups` neighbouring lane groups, fewer where that leaves a
// thread without a unit. Lane groups vary fastest, since neighbours share cache lines and pages.
struct Units {
  std::int64_t groups, images, per_patch, count;

  Units(const TiledPass& pass, std::int64_t batch, std::int64_t threads) {
    const std::int64_t lane_groups = (batch + pass.lane_group - 1) / pass.lane_group;
    groups = groups_per_unit(pass.tiling.groups, lane_groups, pass.patches(), threads);
    images = pass.lane_group * groups;
    per_patch = (batch + images - 1) / images;
    count = per_patch * pass.patches();
  }
};

// The unit that a thread works on.
struct Unit {
  std::int64_t patch = -1;
  PatchBox box{};
  std::vector<PackSegment> segments;  // of the source
  std::int64_t first_image = 0, images = 0;

  std::int64_t groups(const TiledPass& pass) const { return (images + pass.lane_group - 1) / pass.lane_group; }
  int lanes_valid(const TiledPass& pass, std::int64_t group) const {
    return static_cast<int>(std::min(pass.lane_group, images - group * pass.lane_group));
  }
};

// Where the packed pixels of a patch come from: one segment per packed row and column residue.
void list_segments(const TiledPass& pass, const PatchBox& box, std::int64_t source_row, std::int64_t source_column,
                   std::vector<PackSegment>& segments);

template <class T>
void move_to(Unit& unit, std::int64_t index, const Units& units, const TiledPass& pass, std::int64_t batch,
             const Images<const T>& source) {
  unit.first_image = index % units.per_patch * units.images;
  unit.images = std::min(units.images, batch - unit.first_image);
  if (index / units.per_patch == unit.patch) return;
  unit.patch = index / units.per_patch;
  unit.box = patch_box(pass, unit.patch);
  list_segments(pass, unit.box, source.row, source.column, unit.segments);
}

// What packing the images of a unit always needs; which channels and where to is left to the caller.
template <class T>
PackArgs<T> pack_args(const TiledPass& pass, const Unit& unit, const Images<const T>& source,
                      const std::vector<PackSegment>& segments) {
  PackArgs<T> args{};
  args.source = source.data + unit.first_image * source.batch;
  args.source_channel = source.channel;
  args.source_lane = source.batch;
  args.segments = segments.data();
  args.segment_count = static_cast<std::int64_t>(segments.size());
  args.blocks = pass.tiling.blocks;
  args.groups = static_cast<int>(unit.groups(pass));
  args.images = unit.images;
  return args;
}

template <class T>
void pack_block(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t block, const Unit& unit,
                const Images<const T>& source, const NormMap<T>* norm, T* packed) {
  const std::int64_t begin = pass.block_channel_begin[static_cast<std::size_t>(block)];
  PackArgs<T> args = pack_args(pass, unit, source, unit.segments);
  args.channels = pass.channels.data() + begin;
  args.channel_count = pass.block_channel_begin[static_cast<std::size_t>(block) + 1] - begin;
  args.packed = packed;
  args.plane = pass.plane;
  args.packed_group = pass.group;
  args.norm = norm;
  kernels.pack(args);
}

// How a register tile addresses the dest of one lane group: the tensor itself, or a staging patch where the tensor's
// images are not adjacent or do not fill the lane group.
template <class T>
struct DestView {
  T* origin;  // grid position (0, 0) of the patch's coordinates below
  std::int64_t channel, row, column;
};

template <class T>
DestView<T> dest_in_place(const TiledPass& pass, const Images<T>& dest, const Unit& unit, std::int64_t group) {
  return {dest.data + (unit.first_image + group * pass.lane_group) * dest.batch + pass.y.dest_origin * dest.row +
              pass.x.dest_origin * dest.column,
          dest.channel, dest.row * pass.y.dest_step, dest.column * pass.x.dest_step};
}

// Elements of one lane group's staging patch.
inline std::int64_t staged_group(const TiledPass& pass, const PatchBox& box) {
  return pass.dest_channels * box.height * box.width * pass.lane_group;
}

// The first lane group of a unit that is staged, with all after it: none where the count of groups is returned. Where
// the images are adjacent, only the last can need it.
template <class T>
std::int64_t first_staged(const TiledPass& pass, const Images<T>& dest, const Unit& unit) {
  return dest.batch == 1 ? unit.images / pass.lane_group : 0;
}

// `nth` of the staged lane groups.
template <class T>
DestView<T> dest_staged(const TiledPass& pass, const PatchBox& box, T* staging, std::int64_t nth) {
  const std::int64_t row = box.width * pass.lane_group;
  return {staging + nth * staged_group(pass, box) - box.y * row - box.x * pass.lane_group, box.height * row, row,
          pass.lane_group};
}

template <class T>
DestView<T> dest_view(const TiledPass& pass, const Images<T>& dest, const Unit& unit, T* staging, std::int64_t group) {
  const std::int64_t staged = first_staged(pass, dest, unit);
  return group < staged ? dest_in_place(pass, dest, unit, group)
                        : dest_staged(pass, unit.box, staging, group - staged);
}

// What one thread packs and stages into, in elements.
template <class T>
struct UnitMemory {
  std::int64_t packed, staging;

  template <class Dest>
  UnitMemory(const TiledPass& pass, const Units& units, const Images<Dest>& dest, std::int64_t batch)
      : packed(aligned_elements<T>(pass.group * units.groups)) {
    const std::int64_t staged_groups = dest.batch != 1 ? units.groups : (batch % pass.lane_group != 0 ? 1 : 0);
    staging = aligned_elements<T>(pass.dest_channels * largest_patch_pixels(pass) * pass.lane_group * staged_groups);
  }
  std::int64_t size() const { return packed + staging; }
};

struct TaskRange {
  std::int64_t begin, end;

  bool empty() const { return begin == end; }
};

// The tasks of a channel block whose panels lie in rows [row_begin, row_end).
TaskRange tasks_of(const TiledPass& pass, std::int64_t block, std::int64_t row_begin, std::int64_t row_end);

// The same tasks by the height of their panels, less one.
std::array<TaskRange, kMaxPanelHeight> split_by_height(const TiledPass& pass, const TaskRange& tasks);

// Cuts the rows, between panels, into `parts` ranges of equal work: values, and a constant per row for its stores.
std::vector<std::int64_t> cut_rows(const TiledPass& pass, std::int64_t parts);

// Where the vectors of a patch's row lie in the dest.
void run_offsets(const TiledPass& pass, int lanes, std::int64_t columns, std::int64_t dest_column,
                 std::vector<std::int64_t>& offsets);

// Calls visit(tile) for every strip of register tiles of a patch.
struct TileStrip {
  std::int64_t rows, run;  // of each tile
  std::int64_t tiles;      // one after the other
  std::int64_t y, vector;  // first row, and first vector in the patch's rows
};

template <class F>
void for_each_strip(const TiledPass& pass, const PatchBox& box, F&& visit) {
  const std::int64_t vectors = box.width * pass.tiling.blocks, run = std::min(pass.tiling.tile_run, vectors);
  const std::int64_t whole = vectors / run;
  for (std::int64_t ty = box.tile_y_begin; ty < box.tile_y_end; ++ty) {
    const std::int64_t y = pass.y.cuts[static_cast<std::size_t>(ty)];
    const std::int64_t rows = pass.y.cuts[static_cast<std::size_t>(ty) + 1] - y;
    for (std::int64_t i = 0; i < whole; i += pass.tiling.strip) {
      visit(TileStrip{rows, run, std::min(pass.tiling.strip, whole - i), y, i * run});
    }
    if (whole * run < vectors) visit(TileStrip{rows, vectors - whole * run, 1, y, whole * run});
  }
}

// Calls run(height, strip, args) for every strip of register tiles of every lane group of a unit, and there for the tasks
// of every panel height: `args` is TileArgs or GradTileArgs, to which this adds where the tiles lie and which tasks.
// `Dest` is const where the dest is read.
template <class T, class Dest, class Args, class Run>
void walk_tiles(const TiledPass& pass, int lanes, const Unit& unit, const T* packed, const Images<Dest>& dest,
                Dest* staging, const TaskRange& range, Args args, Run&& run) {
  const PatchBox& box = unit.box;
  const std::array<TaskRange, kMaxPanelHeight> by_height = split_by_height(pass, range);
  static thread_local std::vector<std::int64_t> dest_run;
  args.offset = pass.offset.data();
  args.rows = pass.rows.data();
  args.source_row = pass.source_row;
  for (std::int64_t group = 0; group < unit.groups(pass); ++group) {
    const DestView<Dest> view = dest_view(pass, dest, unit, staging, group);
    run_offsets(pass, lanes, box.width, view.column, dest_run);
    args.dest_channel = view.channel;
    args.dest_row = view.row;
    const T* const source = packed + group * pass.group;
    for_each_strip(pass, box, [&](const TileStrip& strip) {
      args.source = source + (strip.y - box.y) * pass.source_row + strip.vector * lanes;
      args.dest = view.origin + strip.y * view.row + box.x * view.column;
      args.dest_run = dest_run.data() + strip.vector;
      for (int height = pass.tiling.height; height >= 1; --height) {
        const TaskRange& tasks = by_height[static_cast<std::size_t>(height - 1)];
        if (tasks.empty()) continue;
        args.task = pass.tasks.data() + tasks.begin;
        args.tasks = tasks.end - tasks.begin;
        run(height, strip, args);
      }
    });
  }
}

}  // namespace fedpai
