// SPDX-License-Identifier: Apache-2.0
// A pass laid out for the streamed walk, which reads the source where it lies.
//
// Without packing there is no zero padding to read, so the dest grid falls into *zones*: ranges of rows and of columns
// whose positions read the image through the same taps. Taps that are valid together are neighbours once sorted by
// shift, so a zone is a range of them per axis, and entries sorted by (dest channel, column shift, row shift, source
// channel) give every zone of full rows one contiguous range.
//
// Source channels are cut into blocks where a block of a small image fits L2: its entries are walked for all dest
// channels before the next block's are added.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv2d/axis.h"

namespace fedpai {

struct StreamZone {
  std::int64_t begin, end;             // grid positions
  std::int64_t tap_begin, tap_end;     // of the axis's taps, sorted by shift
};

// Element strides of the tensor that is read, whose images are adjacent.
struct SourceStrides {
  std::int64_t channel, row, column;

  bool operator==(const SourceStrides& o) const { return channel == o.channel && row == o.row && column == o.column; }
};

struct StreamPass {
  PassAxes axes;
  std::int64_t dest_channels = 0;
  std::int64_t blocks = 1;  // of source channels
  std::int64_t taps_y = 0, taps_x = 0;
  std::vector<StreamZone> zones_y, zones_x;

  IndexVector offset;  // per entry: elements from a dest position's unshifted source, channel 0
  IndexVector order;   // index into the packed values
  bool order_is_identity = false;
  // Where the entries of (block, dest channel, column tap, row tap) begin, in that order; one more at the end.
  std::vector<std::int32_t> piece_begin;

  std::int64_t entries() const { return static_cast<std::int64_t>(offset.size()); }
  std::int32_t piece(std::int64_t block, std::int64_t channel, std::int64_t tap_x, std::int64_t tap_y) const {
    return piece_begin[static_cast<std::size_t>(
        ((block * dest_channels + channel) * taps_x + tap_x) * taps_y + tap_y)];
  }
};

// Whether every offset fits the 32 bits that a StreamPass has for it.
bool can_stream(const PassAxes& axes, const EntryList& list, const SourceStrides& source);

StreamPass stream_pass(const PassAxes& axes, const EntryList& list, const SourceStrides& source,
                       std::int64_t blocks);

}  // namespace fedpai
