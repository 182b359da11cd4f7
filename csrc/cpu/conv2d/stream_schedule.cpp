// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/stream_schedule.h"

#include <algorithm>

namespace fedpai {

namespace {

std::vector<std::int64_t> sorted_shifts(const Axis& axis) {
  std::vector<std::int64_t> shifts;
  for (const std::int64_t shift : axis.shift) {
    if (shift != Axis::kNoTap) shifts.push_back(shift);
  }
  std::sort(shifts.begin(), shifts.end());
  return shifts;
}

std::vector<StreamZone> zones_of(const Axis& axis, const std::vector<std::int64_t>& shifts) {
  std::vector<StreamZone> zones;
  for (std::int64_t q = 0; q < axis.grid; ++q) {
    const std::int64_t at = q * axis.source_step;
    const auto begin = std::lower_bound(shifts.begin(), shifts.end(), -at) - shifts.begin();
    const auto end = std::lower_bound(shifts.begin(), shifts.end(), axis.source_extent - at) - shifts.begin();
    if (!zones.empty() && zones.back().tap_begin == begin && zones.back().tap_end == end) zones.back().end = q + 1;
    else zones.push_back({q, q + 1, begin, end});
  }
  return zones;
}

// Per kernel position: its place among the sorted shifts, or -1.
std::vector<std::int64_t> places(const Axis& axis, const std::vector<std::int64_t>& shifts) {
  std::vector<std::int64_t> result;
  for (const std::int64_t shift : axis.shift) {
    result.push_back(shift == Axis::kNoTap
                         ? -1
                         : std::lower_bound(shifts.begin(), shifts.end(), shift) - shifts.begin());
  }
  return result;
}

}  // namespace

bool can_stream(const PassAxes& axes, const EntryList& list, const SourceStrides& source) {
  // In double: the products may exceed 64 bits.
  const auto reach = [](const Axis& axis, std::int64_t stride) {
    double most = 0;
    for (const std::int64_t shift : axis.shift) {
      if (shift != Axis::kNoTap) most = std::max(most, std::abs(static_cast<double>(shift)));
    }
    return most * std::abs(static_cast<double>(stride));
  };
  return static_cast<double>(list.columns) * std::abs(static_cast<double>(source.channel)) +
             reach(axes.y, source.row) + reach(axes.x, source.column) <
         2147483647.0;
}

StreamPass stream_pass(const PassAxes& axes, const EntryList& list, const SourceStrides& source,
                       std::int64_t blocks) {
  StreamPass pass;
  pass.axes = axes;
  pass.dest_channels = list.rows();
  const std::int64_t channel_block = (list.columns + blocks - 1) / blocks;
  pass.blocks = (list.columns + channel_block - 1) / channel_block;
  const std::vector<std::int64_t> shifts_y = sorted_shifts(axes.y), shifts_x = sorted_shifts(axes.x);
  pass.taps_y = static_cast<std::int64_t>(shifts_y.size());
  pass.taps_x = static_cast<std::int64_t>(shifts_x.size());
  pass.zones_y = zones_of(axes.y, shifts_y);
  pass.zones_x = zones_of(axes.x, shifts_x);

  const std::vector<std::int64_t> place_y = places(axes.y, shifts_y), place_x = places(axes.x, shifts_x);
  std::vector<std::int64_t> piece_of_tap, shift_of_tap;
  for (std::size_t ky = 0; ky < place_y.size(); ++ky) {
    for (std::size_t kx = 0; kx < place_x.size(); ++kx) {
      const bool kept = place_y[ky] >= 0 && place_x[kx] >= 0;
      piece_of_tap.push_back(kept ? place_x[kx] * pass.taps_y + place_y[ky] : -1);
      shift_of_tap.push_back(kept ? axes.y.shift[ky] * source.row + axes.x.shift[kx] * source.column : 0);
    }
  }

  // One counting sort for all channels: count, sum, scatter. Entries of a piece stay in source channel order.
  const std::int64_t pieces = pass.taps_y * pass.taps_x;
  pass.piece_begin.assign(static_cast<std::size_t>(pass.blocks * pass.dest_channels * pieces + 1), 0);
  const auto piece_of = [&](std::int64_t row, std::size_t j) {
    const std::int64_t piece = piece_of_tap[static_cast<std::size_t>(list.tap[j])];
    return piece < 0 ? -1 : (list.column[j] / channel_block * pass.dest_channels + row) * pieces + piece;
  };
  for (std::int64_t row = 0; row < list.rows(); ++row) {
    const auto end = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row) + 1]);
    for (auto j = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row)]); j < end; ++j) {
      const std::int64_t piece = piece_of(row, j);
      if (piece >= 0) ++pass.piece_begin[static_cast<std::size_t>(piece) + 1];
    }
  }
  for (std::size_t i = 1; i < pass.piece_begin.size(); ++i) pass.piece_begin[i] += pass.piece_begin[i - 1];
  pass.offset.resize(static_cast<std::size_t>(pass.piece_begin.back()));
  pass.order.resize(pass.offset.size());
  std::vector<std::int32_t> next(pass.piece_begin.begin(), pass.piece_begin.end());
  for (std::int64_t row = 0; row < list.rows(); ++row) {
    const auto end = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row) + 1]);
    for (auto j = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row)]); j < end; ++j) {
      const std::int64_t piece = piece_of(row, j);
      if (piece < 0) continue;
      const auto at = static_cast<std::size_t>(next[static_cast<std::size_t>(piece)]++);
      pass.offset[at] = static_cast<std::int32_t>(list.column[j] * source.channel +
                                                  shift_of_tap[static_cast<std::size_t>(list.tap[j])]);
      pass.order[at] = list.value[j];
    }
  }
  pass.order_is_identity = true;
  for (std::size_t j = 0; j < pass.order.size() && pass.order_is_identity; ++j) {
    pass.order_is_identity = pass.order[j] == static_cast<std::int32_t>(j);
  }
  return pass;
}

}  // namespace fedpai
