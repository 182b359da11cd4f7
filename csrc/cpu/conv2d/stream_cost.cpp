// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/stream_cost.h"

#include <algorithm>

namespace fedpai {

namespace {

// Cycles, fitted to timings of single layers.
constexpr double kFma = 1.4;        // per source vector of an entry, from L3 or memory
constexpr double kFmaL2 = 1.2;      // the same where the channel block's rows fit L2
constexpr double kSteps = 1.35;     // times as much, where a row is no run but pixels with steps between them
constexpr double kOnePixel = 2.0;   // times as much for images of one pixel: no two taps share what was fetched
constexpr double kDest = 2.5;       // per dest vector: store, or load of its gradient
constexpr double kRound = 1.0;      // per dest vector and further round of entries: load and store again, in L1
constexpr double kBlock = 3.0;      // per dest vector and further channel block: load and store again, from L2 or L3
constexpr double kCall = 60.0;      // per dest channel, row and zone
constexpr double kEntry = 8.0;      // per entry, row and zone: pointer, broadcast
constexpr double kEntriesPerRound = 8.0;
constexpr double kBandRows = 4.0;   // as in run_streamed.cpp
constexpr double kL2Bytes = 320 * 1024;

double estimate(const TilingProblem& p, std::int64_t block_count, double channel_bytes) {
  // A row is one run of all its pixels' images where it can be, else one run per pixel.
  const std::int64_t row_vectors = p.rows_join ? (p.batch * p.grid_w + p.lanes - 1) / p.lanes
                                               : (p.batch + p.lanes - 1) / p.lanes * p.grid_w;
  const double vectors = static_cast<double>(row_vectors * p.grid_h);
  const double channels = static_cast<double>(p.dest_channels);
  const double entries = static_cast<double>(p.entries);
  const auto blocks = static_cast<double>(block_count);
  const double rounds = std::max(0.0, entries / channels / kEntriesPerRound - blocks);
  // Taps that leave the image are not walked.
  const auto inside = [](std::int64_t grid, std::int64_t halo) {
    return std::max(0.3, 1.0 - static_cast<double>(halo) / (3.0 * static_cast<double>(std::max<std::int64_t>(1, grid))));
  };
  const double zones = p.halo_w > 0 ? std::min(3.0, static_cast<double>(p.grid_w)) : 1.0;
  const double fma = (static_cast<double>(p.source_channels) / blocks * channel_bytes <= kL2Bytes ? kFmaL2 : kFma) *
                     (p.rows_join ? 1.0 : kSteps) * (p.grid_h * p.grid_w == 1 ? kOnePixel : 1.0);
  return vectors * (entries * inside(p.grid_h, p.halo_h) * inside(p.grid_w, p.halo_w) * fma +
                    channels * (kDest + rounds * kRound + (blocks - 1.0) * kBlock)) +
         static_cast<double>(p.grid_h) * zones * (blocks * channels * kCall + entries * kEntry);
}

}  // namespace

StreamChoice choose_stream(const TilingProblem& p) {
  const double rows = std::min(static_cast<double>(p.grid_h), kBandRows) * static_cast<double>(p.phases_h) +
                      static_cast<double>(p.halo_h);
  const double channel_bytes = std::min(rows, static_cast<double>(p.grid_h * p.phases_h)) *
                               static_cast<double>(p.grid_w * p.phases_w * p.batch * p.element_size);
  StreamChoice best{1, estimate(p, 1, channel_bytes)};
  const auto fitting = static_cast<std::int64_t>(kL2Bytes / channel_bytes);
  if (fitting >= 1 && fitting < p.source_channels) {
    const std::int64_t blocks = (p.source_channels + fitting - 1) / fitting;
    const double cycles = estimate(p, blocks, channel_bytes);
    if (cycles < best.cycles) best = {blocks, cycles};
  }
  return best;
}

}  // namespace fedpai
