// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides for the tiled walk: packing a patch, and walking the non-zeros over one register
// tile of it. The loops over patches, threads and channel blocks are in run_tiled*.cpp and know no SIMD.
//
// Vocabulary. The *source* is what is read through the weights (input for the forward pass, output gradient for the
// input gradient); the *dest* is the other side. A *lane group* is `blocks` vectors of consecutive images. A *patch* is
// a rectangle of dest pixels; a *unit* of work is a patch of several neighbouring lane groups, since their images share
// cache lines and pages. Its source pixels, with halo and zero padding, are packed to
//
//   packed[lane group][channel][row][column * blocks + block][lane]
//
// with rows `source_row` apart, channels `plane` and lane groups `packed_group`.
//
// A *register tile* is `rows` x `run` vectors of dest, a run being neighbours in a row of the patch (pixel by pixel, block by
// block); all of them live in registers while the
// non-zeros of one dest channel (a *task*) are walked. Because the packing has removed borders, strides and dilation,
// vector (r, k) of a tile reads non-zero j at  source + offset[j] + r * source_row + k * lanes.
//
// A *panel* is up to four dest channels that keep the same weights (plan/row_groups.h): each of its entries has as many
// values, and a task is one panel's.
#pragma once

#include <cstdint>

#include "cpu/conv2d/stream_kernels.h"
#include "cpu/norm/kernels.h"
#include "plan/row_groups.h"

namespace fedpai {

constexpr int kMaxTileRows = 4;
constexpr int kMaxTileRun = 28;
// Kernels read so many offsets beyond a task's: those of the next tasks, or zeros after the last.
constexpr int kOffsetsAhead = 4;

// Entries [begin, end) of the stream belong to one panel of dest channels, whose first is `channel`.
struct RowTask {
  std::int32_t channel;
  std::int32_t row;    // index of that channel in the pass's order of rows; the panel's others follow
  std::int32_t begin;
  std::int32_t end;
  std::int32_t value;  // of the first entry: values lie entry by entry, and in each row by row
};

template <class T>
struct TileArgs {
  const T* source;  // packed patch at the tile's corner, aligned to a vector
  std::int64_t source_row;
  std::int64_t tiles;  // as many of this size, one after the other in their row: all of them for a task before the next
  const std::int32_t* offset;  // per entry, elements
  const T* value;              // by RowTask::value (forward direction only)
  const std::int32_t* rows;    // dest channels by RowTask::row
  const RowTask* task;
  std::int64_t tasks;
  T* dest;  // pixel (0, 0) of the tile, channel 0; vector (r, k) of channel c is at c*dest_channel + r*dest_row + dest_run[k]
  std::int64_t dest_channel;
  std::int64_t dest_row;
  const std::int64_t* dest_run;
  const T* bias;    // per dest channel, or null
  bool accumulate;  // start from what dest holds instead of the bias
};

template <class T>
struct GradTileArgs {
  const T* source;
  std::int64_t source_row;
  const std::int32_t* offset;
  const std::int32_t* rows;
  const RowTask* task;
  std::int64_t tasks;
  std::int64_t tile_rows, tile_run;  // the tile's size, for kernels that are not made for one
  const T* dest;  // the output gradient, addressed like TileArgs::dest
  std::int64_t dest_channel;
  std::int64_t dest_row;
  const std::int64_t* dest_run;
  T* sums;          // by RowTask::value, added to
  T* bias_sums;     // [channel][lane] or null; always added to
};

// One run of pixels of one packed row: `left` zero pixels, then `count` pixels `step` elements apart in the source,
// then `right` zero pixels.
struct PackSegment {
  std::int64_t packed;  // element offset in the channel's plane
  std::int64_t source;  // element offset of the first pixel in the source channel
  std::int64_t step;
  std::int32_t left;
  std::int32_t count;
  std::int32_t right;
};

template <class T>
struct PackArgs {
  const T* source;  // first image of the lane groups
  std::int64_t source_channel;
  std::int64_t source_lane;      // 1 in batch-last layout
  const std::int32_t* channels;  // which source channels, in packed order; null: 0, 1, 2, ...
  std::int64_t channel_count;
  const PackSegment* segments;
  std::int64_t segment_count;
  T* packed;
  std::int64_t plane;
  int blocks;
  int groups;                 // neighbouring lane groups that are packed together,
  std::int64_t packed_group;  // this many elements apart
  std::int64_t images;        // present in these lane groups, the last of them included; the rest is packed as zero
  const NormMap<T>* norm;     // of the source's channels, for its pixels but not for padding; null: packed as they are
};

// The inverse of packing, for the cases that a tile cannot store directly: a lane group that the batch does not fill,
// or a dest whose images are not adjacent.
template <class T>
struct UnpackArgs {
  const T* packed;
  std::int64_t plane;
  std::int64_t packed_row;
  T* dest;
  std::int64_t dest_channel;
  std::int64_t dest_row;
  std::int64_t dest_column;
  std::int64_t dest_lane;
  const std::int32_t* channels;  // which
  std::int64_t channel_count;
  std::int64_t rows;
  std::int64_t columns;
  int blocks;
  int lanes_valid;
};

template <class T>
struct Conv2dKernels {
  using Tile = void (*)(const TileArgs<T>&);
  using GradTile = void (*)(const GradTileArgs<T>&);

  int lanes;
  int accumulators;  // vectors that a tile may have,
  int pinned;        // a weight gradient's tile,
  int panel;         // and a tile of all rows of a panel together
  // [panel height - 1][rows - 1][run - 1]; null where they are more.
  Tile tile[kMaxPanelHeight][kMaxTileRows][kMaxTileRun];
  GradTile grad_tile[kMaxTileRows][kMaxTileRun];
  GradTile grad_panel[kMaxPanelHeight];  // [panel height - 1]; tiles of any size
  void (*pack)(const PackArgs<T>&);
  void (*unpack)(const UnpackArgs<T>&);
  // grad[order[j]] = sum over parts and lanes of sums[part][j][lane], in that fixed order, for j in [begin, end).
  void (*reduce)(const T* sums, std::int64_t parts, std::int64_t part_stride, const std::int32_t* order,
                 std::int64_t begin, std::int64_t end, T* grad);
  StreamKernels<T> stream;
};

}  // namespace fedpai
