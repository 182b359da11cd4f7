// SPDX-License-Identifier: Apache-2.0
// How a grid of pixels and a batch are cut into tiles of one warp.
//
// A lane holds a strip of P neighbouring pixels of a grid row, for V neighbouring images. The 32 lanes of a warp are a
// box: `vectors` runs of V images, innermost, so that they read whole sectors; then `across` strips of a row; then `down`
// rows. All three are powers of two. A tile that reaches over the end of the grid or of the batch has idle lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/warp.h"

namespace fedpai::cuda {

struct Tiles {
  std::int32_t log_vectors, log_across, log_down;
  std::int32_t in_batch, in_width, in_height;  // tiles along the batch and the grid

  std::int64_t count() const { return std::int64_t{in_batch} * in_width * in_height; }
};

// Where a lane's strip begins in the grid, and its images in the batch.
struct Place {
  std::int32_t y, x, n;
};

template <int V, int P>
FEDPAI_DEVICE Place place_of(const Tiles& tiles, std::uint32_t tile, int lane) {
  const std::uint32_t batches = static_cast<std::uint32_t>(tiles.in_batch), widths = static_cast<std::uint32_t>(tiles.in_width);
  const std::uint32_t box = tile / batches, tile_y = box / widths;
  const auto tile_n = static_cast<std::int32_t>(tile - box * batches), tile_x = static_cast<std::int32_t>(box - tile_y * widths);
  const int strip = lane >> tiles.log_vectors;
  const int vector = lane & ((1 << tiles.log_vectors) - 1), across = strip & ((1 << tiles.log_across) - 1);
  return {(static_cast<std::int32_t>(tile_y) << tiles.log_down) + (strip >> tiles.log_across),
          ((tile_x << tiles.log_across) + across) * P, ((tile_n << tiles.log_vectors) + vector) * V};
}

// ---- choice, on the host ----------------------------------------------------------------------------------------

// What one warp computes at a time, as template arguments.
struct Strip {
  int images, pixels;  // V, P
};

struct GridShape {
  std::int64_t height, width, batch;
  std::int64_t source_step_h, source_step_w;  // pixels of the source per pixel of the grid
};

inline std::int64_t divided_up(std::int64_t dividend, std::int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// The longest strip that does not waste more than a fifth of its pixels. Vectors need whole runs of four images.
inline Strip choose_strip(const GridShape& grid) {
  if (grid.batch % 4 != 0) return {1, 2};
  for (const int pixels : {4, 2}) {
    if (divided_up(grid.width, pixels) * pixels * 4 <= grid.width * 5) return {4, pixels};
  }
  return {4, 1};
}

// What a tile costs, in vectors read, whether its lanes are idle or not: more than what it can save on reading.
constexpr std::int64_t kTileCost = 8192;

// The box that reads the fewest pixels of the source, one pixel of reach on each side counted, and then the squarest.
// line_vectors: how many vectors fill the 128 bytes of a cache line.
inline Tiles choose_tiles(const GridShape& grid, const Strip& strip, std::int64_t line_vectors) {
  const std::int64_t vectors = divided_up(grid.batch, strip.images), strips = divided_up(grid.width, strip.pixels);
  Tiles best{};
  std::int64_t least = 0;
  for (int log_vectors = 0; log_vectors <= 5; ++log_vectors) {
    const std::int64_t in_lane = std::int64_t{1} << log_vectors;
    // Fewer than a line only where the batch has no more; more than a line only where the grid has too few strips.
    if (in_lane < line_vectors && in_lane < vectors) continue;
    for (int log_across = 0; log_across + log_vectors <= 5; ++log_across) {
      const int log_down = 5 - log_vectors - log_across;
      const std::int64_t across = std::int64_t{1} << log_across, down = std::int64_t{1} << log_down;
      const std::int64_t in_batch = divided_up(vectors, in_lane), in_width = divided_up(strips, across),
                         in_height = divided_up(grid.height, down);
      const std::int64_t pixels = ((down - 1) * grid.source_step_h + 3) * ((across * strip.pixels - 1) * grid.source_step_w + 3);
      const std::int64_t cost = in_batch * in_width * in_height * (kTileCost + in_lane * pixels);
      if (least != 0 && cost >= least) continue;
      least = cost;
      best = {log_vectors, log_across, log_down, static_cast<std::int32_t>(in_batch), static_cast<std::int32_t>(in_width),
              static_cast<std::int32_t>(in_height)};
    }
  }
  return best;
}

}  // namespace fedpai::cuda
