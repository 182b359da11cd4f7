// SPDX-License-Identifier: Apache-2.0
// The pieces that both directions of the convolution share: where patches lie, how they are packed, and how the register
// tiles of a patch address the dest.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv2d/conv2d.h"
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

// A unit of work is one patch of one lane group. Lane groups vary fastest: neighbours share cache lines and pages.
struct Units {
  std::int64_t groups, count;

  Units(const TiledPass& pass, std::int64_t batch)
      : groups((batch + pass.lane_group - 1) / pass.lane_group), count(groups * pass.patches()) {}
  std::int64_t patch(std::int64_t unit) const { return unit / groups; }
  std::int64_t group(std::int64_t unit) const { return unit % groups; }
};

// Where the packed pixels of a patch come from: one segment per packed row and column residue.
void list_segments(const TiledPass& pass, const PatchBox& box, std::int64_t source_row, std::int64_t source_column,
                   std::vector<PackSegment>& segments);

// Packs one channel block of one unit.
template <class T>
void pack_block(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t block, const Images<const T>& source,
                std::int64_t first_image, int lanes_valid, const std::vector<PackSegment>& segments, T* packed) {
  const std::int64_t begin = pass.block_channel_begin[static_cast<std::size_t>(block)];
  const std::int64_t end = pass.block_channel_begin[static_cast<std::size_t>(block) + 1];
  PackArgs<T> args{};
  args.source = source.data + first_image * source.batch;
  args.source_channel = source.channel;
  args.source_lane = source.batch;
  args.channels = pass.channels.data() + begin;
  args.channel_count = end - begin;
  args.segments = segments.data();
  args.segment_count = static_cast<std::int64_t>(segments.size());
  args.packed = packed;
  args.plane = pass.plane;
  args.blocks = pass.tiling.blocks;
  args.lanes_valid = lanes_valid;
  kernels.pack(args);
}

// How a register tile addresses the dest: the tensor itself, or a staging patch where the tensor's images are not
// adjacent or do not fill the lane group.
template <class T>
struct DestView {
  T* origin;  // grid position (0, 0) of the patch's coordinates below
  std::int64_t channel, row, column;
};

template <class T>
DestView<T> dest_in_place(const TiledPass& pass, const Images<T>& dest, std::int64_t first_image) {
  return {dest.data + first_image * dest.batch + pass.y.dest_origin * dest.row + pass.x.dest_origin * dest.column,
          dest.channel, dest.row * pass.y.dest_step, dest.column * pass.x.dest_step};
}

template <class T>
DestView<T> dest_staged(const TiledPass& pass, const PatchBox& box, T* staging) {
  const std::int64_t row = box.width * pass.lane_group;
  return {staging - box.y * row - box.x * pass.lane_group, box.height * row, row, pass.lane_group};
}

// Where the vectors of a register tile's row lie in the dest.
void run_offsets(const TiledPass& pass, int lanes, std::int64_t columns, std::int64_t dest_column, std::int64_t* offsets);

// Calls visit(rows, run, corner y, corner x) for every register tile of a patch.
template <class F>
void for_each_tile(const TiledPass& pass, const PatchBox& box, F&& visit) {
  for (std::int64_t ty = box.tile_y_begin; ty < box.tile_y_end; ++ty) {
    const std::int64_t y = pass.y.cuts[static_cast<std::size_t>(ty)];
    const std::int64_t rows = pass.y.cuts[static_cast<std::size_t>(ty) + 1] - y;
    for (std::int64_t tx = box.tile_x_begin; tx < box.tile_x_end; ++tx) {
      const std::int64_t x = pass.x.cuts[static_cast<std::size_t>(tx)];
      const std::int64_t columns = pass.x.cuts[static_cast<std::size_t>(tx) + 1] - x;
      visit(rows, columns, y, x);
    }
  }
}

struct TaskRange {
  std::int64_t begin, end;
};

// The tasks of a channel block whose dest channel lies in [channel_begin, channel_end).
TaskRange tasks_of(const TiledPass& pass, std::int64_t block, std::int64_t channel_begin, std::int64_t channel_end);

// Cuts the dest channels into `parts` ranges of equal work: entries, and a constant per channel for its stores.
std::vector<std::int64_t> cut_channels(const TiledPass& pass, std::int64_t parts);

}  // namespace fedpai
