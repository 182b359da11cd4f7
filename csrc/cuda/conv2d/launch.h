// SPDX-License-Identifier: Apache-2.0
// What a launch of the convolution consists of: checked sizes, and the choice of tiles, warps per block and splits. Plain
// functions of the shapes and the number of SMs, which tests call on the host.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/conv2d/gather.cuh"
#include "cuda/conv2d/weight_grad.cuh"
#include "cuda/fedpai_cuda.h"

namespace fedpai::cuda {

constexpr int kMostWarps = 16;   // of a block: the rows that share what L1 holds
constexpr int kWarpsPerSm = 32;  // wanted, to hide the latency of loads
constexpr std::int64_t kMostClients = 65535;  // what the third extent of a grid holds

struct GatherLaunch {
  Strip strip;
  Tiles tiles;
  std::int32_t passes, clients;
  int warps;            // of a block
  std::int64_t blocks;  // of each pass and client
};

struct WeightGradLaunch {
  Strip strip;
  Tiles tiles;
  int warps;
  std::int64_t blocks;  // of each split and client
  std::int32_t splits, clients;
};

// Vectors that fill a cache line, or a warp.
inline std::int64_t line_vectors(std::int64_t element_size, const Strip& strip) {
  return std::min<std::int64_t>(kWarp, 128 / (element_size * strip.images));
}

// Whether every index that a kernel forms is exact: 0, or FEDPAI_CUDA_TOO_LARGE. entry_count: of the plan.
inline int check_size(const FedpaiConv2d& c, std::int64_t entry_count) {
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  // By steps, so that no product here overflows either.
  const auto fits = [&](std::int64_t channels, std::int64_t h, std::int64_t w, std::int64_t n) {
    std::int64_t count = 1;
    for (const std::int64_t size : {c.clients, channels, h, w, n}) {
      if (size < 0 || size >= limit || count * size >= limit) return false;
      count *= std::max<std::int64_t>(size, 1);
    }
    return true;
  };
  const bool images = fits(c.in_channels, c.in_h, c.in_w, c.batch) && fits(c.out_channels, c.out_h, c.out_w, c.batch);
  // Idle lanes count on behind the grid: by up to 32 rows or 32 strips of 4.
  const auto steps = [](std::int64_t grid, std::int64_t step) { return step > 0 && step < limit / 4 && (grid + 128) * step < limit / 2; };
  const bool strides = images && steps(c.out_h, c.stride_h) && steps(c.out_w, c.stride_w) && c.stride_h * c.stride_w < 65536 &&
                       steps(c.in_h, 1) && steps(c.in_w, 1);
  const bool values = entry_count >= 0 && entry_count < limit && c.clients <= kMostClients && c.clients * entry_count < limit;
  return strides && values ? 0 : FEDPAI_CUDA_TOO_LARGE;
}

// As many warps a block as leave at least one block for every SM. tiles: of all passes and clients.
inline int warps_per_block(std::int64_t rows, std::int64_t tiles, int sms) {
  int warps = kMostWarps;
  while (warps > 1 && (warps / 2 >= rows || divided_up(rows, warps) * tiles < sms)) warps /= 2;
  return warps;
}

// The strip for a grid: shorter than choose_strip says where that leaves too few warps. rows: of all passes and clients.
inline Strip strip_for(const GridShape& grid, std::int64_t rows, std::int64_t element_size, int sms, Tiles& tiles) {
  Strip strip = choose_strip(grid);
  tiles = choose_tiles(grid, strip, line_vectors(element_size, strip));
  while (strip.images == 4 && strip.pixels > 1 && tiles.count() * rows < std::int64_t{kWarpsPerSm} * sms) {
    strip.pixels /= 2;
    tiles = choose_tiles(grid, strip, line_vectors(element_size, strip));
  }
  return strip;
}

inline std::int64_t element_size(const FedpaiConv2d& c) { return c.dtype == FEDPAI_CUDA_BF16 ? 2 : 4; }

inline GatherLaunch forward_launch(const FedpaiConv2d& c, int sms) {
  GatherLaunch launch{};
  const GridShape grid{c.out_h, c.out_w, c.batch, c.stride_h, c.stride_w};
  launch.strip = strip_for(grid, c.out_channels * c.clients, element_size(c), sms, launch.tiles);
  launch.passes = 1;
  launch.clients = static_cast<std::int32_t>(c.clients);
  launch.warps = warps_per_block(c.out_channels, launch.tiles.count() * c.clients, sms);
  launch.blocks = divided_up(c.out_channels, launch.warps) * launch.tiles.count();
  return launch;
}

inline GatherLaunch input_grad_launch(const FedpaiConv2d& c, int sms) {
  GatherLaunch launch{};
  const GridShape first_pass{divided_up(c.in_h, c.stride_h), divided_up(c.in_w, c.stride_w), c.batch, 1, 1};
  launch.passes = static_cast<std::int32_t>(c.stride_h * c.stride_w);
  launch.clients = static_cast<std::int32_t>(c.clients);
  launch.strip = strip_for(first_pass, c.in_channels * launch.passes * c.clients, element_size(c), sms, launch.tiles);
  launch.warps = warps_per_block(c.in_channels, launch.tiles.count() * launch.passes * c.clients, sms);
  launch.blocks = divided_up(c.in_channels, launch.warps) * launch.tiles.count();
  return launch;
}

// Splits: enough for kWarpsPerSm, but each with tiles enough that adding its lanes up at the end does not count.
inline WeightGradLaunch weight_grad_launch(const FedpaiConv2d& c, std::int64_t groups, int sms) {
  constexpr std::int64_t least_tiles = 8;
  WeightGradLaunch launch{};
  launch.strip = choose_strip({c.out_h, c.out_w, c.batch, c.stride_h, c.stride_w});
  launch.tiles = choose_tiles({c.out_h, c.out_w, c.batch, c.stride_h, c.stride_w}, launch.strip,
                              line_vectors(element_size(c), launch.strip));
  launch.warps = kMostWarps;
  while (launch.warps > 1 && launch.warps / 2 >= groups) launch.warps /= 2;
  launch.blocks = divided_up(groups, launch.warps);
  launch.clients = static_cast<std::int32_t>(c.clients);
  const std::int64_t warps = launch.blocks * launch.warps * std::max<std::int64_t>(1, c.clients);  // of each split
  const std::int64_t wanted = divided_up(std::int64_t{kWarpsPerSm} * sms, warps);
  const std::int64_t possible = std::max<std::int64_t>(1, launch.tiles.count() / least_tiles);
  launch.splits = static_cast<std::int32_t>(std::clamp<std::int64_t>(wanted, 1, std::min<std::int64_t>(possible, 65535)));
  return launch;
}

template <class T>
GatherArgs<T> forward_args(const FedpaiConv2d& c, const FedpaiRowStream& s, const GatherLaunch& launch, const T* x,
                           const float* values, const float* bias, T* y) {
  const auto narrow = [](std::int64_t i) { return static_cast<std::int32_t>(i); };
  return {x, y, values, bias, static_cast<const Entry*>(s.entries), s.row_begin, s.row_order, launch.tiles,
          narrow(s.entry_count), narrow(c.out_channels), narrow(c.in_channels), narrow(c.batch),
          narrow(c.in_h), narrow(c.in_w), narrow(c.out_h), narrow(c.out_w), narrow(c.stride_h), narrow(c.stride_w), 1, 1};
}

template <class T>
GatherArgs<T> input_grad_args(const FedpaiConv2d& c, const FedpaiRowStream& s, const GatherLaunch& launch, const T* dy,
                              const float* values, T* dx) {
  const auto narrow = [](std::int64_t i) { return static_cast<std::int32_t>(i); };
  return {dy, dx, values, nullptr, static_cast<const Entry*>(s.entries), s.row_begin, s.row_order, launch.tiles,
          narrow(s.entry_count), narrow(c.in_channels), narrow(c.out_channels), narrow(c.batch),
          narrow(c.out_h), narrow(c.out_w), narrow(c.in_h), narrow(c.in_w), 1, 1, narrow(c.stride_h), narrow(c.stride_w)};
}

template <class T>
WeightGradArgs<T> weight_grad_args(const FedpaiConv2d& c, const FedpaiGroupStream& s, const WeightGradLaunch& launch,
                                   const T* x, const T* dy, float* partial, bool with_bias) {
  const auto narrow = [](std::int64_t i) { return static_cast<std::int32_t>(i); };
  return {x, dy, partial, static_cast<const Entry*>(s.entries), static_cast<const Group*>(s.groups), launch.tiles,
          narrow(s.entry_count), narrow(c.out_channels), narrow(c.in_channels), narrow(c.batch), launch.splits,
          narrow(c.in_h), narrow(c.in_w), narrow(c.out_h), narrow(c.out_w), narrow(c.stride_h), narrow(c.stride_w), with_bias};
}

// What warp `warp` of block `block` computes: rows are the faster index, so that blocks which read the same tile run at
// the same time.
struct GatherWork {
  std::int64_t rank;  // into the rows' order; may lie behind the last row
  std::uint32_t tile;
};
FEDPAI_DEVICE GatherWork gather_work(std::int32_t rows, int warps, std::uint32_t block, int warp) {
  const std::uint32_t row_blocks = (static_cast<std::uint32_t>(rows) + static_cast<std::uint32_t>(warps) - 1) / static_cast<std::uint32_t>(warps);
  const std::uint32_t tile = block / row_blocks;
  return {std::int64_t{block - tile * row_blocks} * warps + warp, tile};
}

}  // namespace fedpai::cuda
