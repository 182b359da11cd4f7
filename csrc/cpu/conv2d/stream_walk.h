// SPDX-License-Identifier: Apache-2.0
// What the streamed walks share: the entries of a zone, where its rectangles lie, the units that threads take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv2d/conv2d.h"
#include "cpu/conv2d/partition.h"
#include "cpu/conv2d/stream_kernels.h"
#include "cpu/conv2d/stream_schedule.h"

namespace fedpai {

// Rows of the dest whose channels are walked together, so that the source rows they share come from the nearest cache.
inline constexpr std::int64_t kBandRows = 4;
// Images per lane block: a long batch is cut so that a band of all channels stays in cache.
inline constexpr std::int64_t kLaneBlock = 128;
inline constexpr std::int64_t kUnitsPerThread = 4;
// A dest of so many bytes is not in the caches any more when the next operation begins to read it, so it need not pass
// through them: nothing is fetched that will be overwritten. 64 channels 32x32, 1.7 %, 64 images, two threads of an AMD EPYC
// Genoa: input gradient 2.19 to 1.93 ms, forward with the batch norm that reads it 3.36 to 3.13; half of it: no difference.
inline constexpr std::int64_t kLargeDest = 8 << 20;
inline constexpr std::int64_t kLine = 64;

// Entries of one dest channel: the positions [first, first + count) of the pass, or, where gathered, those in `entry`.
template <class T>
struct EntryRun {
  const std::int32_t* offset = nullptr;
  const T* value = nullptr;             // null where only sums are wanted
  const std::int32_t* entry = nullptr;  // null where they are neighbours, or no sums are wanted
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// The entries that a zone reads in full. One range of the stream where the zone has all row taps; else gathered.
template <class T>
class ZoneEntries {
 public:
  // values: in walking order, or null; `sums` are wanted or not.
  ZoneEntries(const StreamPass& pass, const T* values, bool sums) : pass_(pass), values_(values), sums_(sums) {}

  EntryRun<T> of(std::int64_t block, std::int64_t channel, const StreamZone& y, const StreamZone& x) {
    EntryRun<T> run;
    if (y.tap_begin == y.tap_end || x.tap_begin == x.tap_end) return run;
    if (x.tap_end - x.tap_begin == 1 || y.tap_end - y.tap_begin == pass_.taps_y) {
      run.first = pass_.piece(block, channel, x.tap_begin, y.tap_begin);
      run.count = pass_.piece(block, channel, x.tap_end - 1, y.tap_end) - run.first;
      run.offset = pass_.offset.data() + run.first;
      run.value = values_ != nullptr ? values_ + run.first : nullptr;
      return run;
    }
    offset_.clear();
    value_.clear();
    entry_.clear();
    for (std::int64_t tap = x.tap_begin; tap < x.tap_end; ++tap) {
      const std::int32_t begin = pass_.piece(block, channel, tap, y.tap_begin);
      const std::int32_t end = pass_.piece(block, channel, tap, y.tap_end);
      offset_.insert(offset_.end(), pass_.offset.begin() + begin, pass_.offset.begin() + end);
      if (values_ != nullptr) value_.insert(value_.end(), values_ + begin, values_ + end);
      for (std::int32_t j = begin; sums_ && j < end; ++j) entry_.push_back(j);
    }
    run.offset = offset_.data();
    run.value = value_.data();
    run.entry = entry_.data();
    run.count = static_cast<std::int64_t>(offset_.size());
    return run;
  }

 private:
  const StreamPass& pass_;
  const T* values_;
  bool sums_;
  std::vector<std::int32_t> offset_;
  std::vector<T> value_;
  std::vector<std::int32_t> entry_;
};

// Where the rectangles of a pass lie in its two tensors.
template <class Source, class Dest>
class Rectangles {
 public:
  Rectangles(const StreamPass& pass, std::int64_t batch, const Images<Source>& source, const Images<Dest>& dest)
      : source_(source),
        dest_(dest),
        origin_(pass.axes.y.dest_origin * dest.row + pass.axes.x.dest_origin * dest.column),
        source_row_(source.row * pass.axes.y.source_step),
        source_pixel_(source.column * pass.axes.x.source_step),
        dest_row_(dest.row * pass.axes.y.dest_step),
        dest_pixel_(dest.column * pass.axes.x.dest_step),
        lane_block_(batch <= kLaneBlock ? batch : kLaneBlock),
        batch_(batch),
        joins_(lane_block_ == batch && source_pixel_ == batch && dest_pixel_ == batch) {}

  std::int64_t lane_blocks() const { return (batch_ + lane_block_ - 1) / lane_block_; }

  StreamShape shape(std::int64_t lane_block, std::int64_t rows, const StreamZone& x) const {
    const std::int64_t images = std::min(lane_block_, batch_ - lane_block * lane_block_);
    const std::int64_t pixels = x.end - x.begin;
    if (joins_) return {rows, source_row_, dest_row_, 1, 0, 0, pixels * images};
    return {rows, source_row_, dest_row_, pixels, source_pixel_, dest_pixel_, images};
  }
  Source* source(std::int64_t lane_block, std::int64_t y, std::int64_t x) const {
    return source_.data + y * source_row_ + x * source_pixel_ + lane_block * lane_block_;
  }
  Dest* dest(std::int64_t channel, std::int64_t lane_block, std::int64_t y, std::int64_t x) const {
    return dest_.data + channel * dest_.channel + origin_ + y * dest_row_ + x * dest_pixel_ + lane_block * lane_block_;
  }

 private:
  Images<Source> source_;
  Images<Dest> dest_;
  std::int64_t origin_, source_row_, source_pixel_, dest_row_, dest_pixel_, lane_block_, batch_;
  bool joins_;  // a pixel's images are followed by the next pixel's, on both sides
};

inline std::vector<std::int64_t> cut_channels(const StreamPass& pass, std::int64_t parts) {
  constexpr std::int64_t kWorkPerChannel = 2;  // the dest's own traffic, in entries
  std::vector<std::int64_t> work(static_cast<std::size_t>(pass.dest_channels), kWorkPerChannel);
  for (std::int64_t block = 0; block < pass.blocks; ++block) {
    for (std::int64_t c = 0; c < pass.dest_channels; ++c) {
      work[static_cast<std::size_t>(c)] += pass.piece(block, c + 1, 0, 0) - pass.piece(block, c, 0, 0);
    }
  }
  return cut_by_work(work, std::min(parts, pass.dest_channels));
}

inline std::int64_t bands_of(const StreamPass& pass) { return (pass.axes.y.grid + kBandRows - 1) / kBandRows; }

// Calls visit(rows' zone cut to the band, columns' zone).
template <class F>
void for_each_zone(const StreamPass& pass, std::int64_t band, F&& visit) {
  const std::int64_t first = band * kBandRows, last = std::min(pass.axes.y.grid, first + kBandRows);
  for (StreamZone y : pass.zones_y) {
    y.begin = std::max(y.begin, first);
    y.end = std::min(y.end, last);
    if (y.begin >= y.end) continue;
    for (const StreamZone& x : pass.zones_x) visit(y, x);
  }
}

template <class T>
bool stores_past_caches(const StreamPass& pass, std::int64_t batch, const Images<T>& dest) {
  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(T)); };
  const std::int64_t pixels = pass.axes.y.grid * pass.axes.x.grid;
  return pass.blocks == 1 && bytes(pass.dest_channels * pixels * batch) >= kLargeDest && bytes(batch) % kLine == 0 &&
         reinterpret_cast<std::uintptr_t>(dest.data) % kLine == 0 && bytes(dest.channel) % kLine == 0 &&
         bytes(dest.row) % kLine == 0 && bytes(dest.column) % kLine == 0;
}

}  // namespace fedpai
