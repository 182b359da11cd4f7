// SPDX-License-Identifier: Apache-2.0
// Gradients of the packed values and of the bias of a sparse convolution, in two passes of fixed order.
//
//   partial[s, e]     = sum over the tiles of split s of  dy[row, q, n] * x[column, q * stride + (dy, dx), n]
//   partial[s, E + o] = sum over the tiles of split s of  dy[o, q, n]                         where a bias is wanted
//   dvalues[value of e] = sum over s, ascending, of partial[s, e];  dbias[o] likewise
//
// for E entries, and for each of K clients that share them. Both are overwritten. Nothing is added atomically: the bits
// depend on the operands, the launch's number of splits, which the numbers of SMs and of clients decide, and nothing else.
//
// Layout: x and dy as source and dest of gather.cuh; dvalues (K, E), dbias (K, rows) and partial (K, splits, E + rows) are
// float32. Of partial, the workspace, only what a bias needs is written behind E.
//
// The reduction runs over pixels and batch, 10^4 to 10^6 terms into few sums, so it is split over blocks. A warp takes a
// group of up to 8 entries of one row and walks the tiles of its split: it loads a strip of dy once, then for each entry
// the strip of x, and keeps one sum per entry and lane. Lanes are added up once, at the end.
//
//   operand     (1 + 1 / entries of the group) vector loads per V multiply-adds and pixel, entries of the group 6 of 8
//               on average: 6/7 of the forward pass's ceiling, 14 TFLOP/s of an H100's 67 in float32
//   reuse       the warps of a block walk the same tiles at the same pace with groups that lie in one block of columns
//               (streams.h): as many lines of x serve them as the block has columns, and one of dy per row
//   DRAM        bytes = (x + dy) * element size + 8 * splits * entries, operations = 2 * entries * pixels * N
//   clients     K times all that, in fewer splits each: together they fill the device, and partial stays as small
//
// Floors as in gather.cuh, of the same layers: 64 channels at 32 x 32: 67 MB and 0.19 GFLOP, so 20 us; 512 channels at
// 4 x 4: 8.4 MB and 0.19 GFLOP, so 14 us.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
#pragma once

#include "cuda/conv2d/gather.cuh"

namespace fedpai::cuda {

template <class T>
struct WeightGradArgs {
  const T* x;
  const T* dy;
  float* partial;
  const Entry* entries;
  const Group* groups;
  Tiles tiles;
  std::int32_t entry_count, rows, columns, batch, splits;
  std::int32_t in_h, in_w, out_h, out_w;
  std::int32_t stride_h, stride_w;
  bool with_bias;

  FEDPAI_DEVICE std::int64_t split_size() const { return std::int64_t{entry_count} + rows; }
};

// What a warp shares: its entries, scaled, and its lanes' sums. The gap keeps lanes that read a row off one bank.
struct GroupScratch {
  Record records[kGroupEntries];
  float sums[kGroupEntries + 1][kWarp + 1];
};

// Sums of group `group` of client `client` over tiles [tile, tile_end), into split `split`.
template <class T, int V, int P, class Warp>
FEDPAI_DEVICE void reduce_group(const WeightGradArgs<T>& a, const Warp& warp, GroupScratch* scratch, const Group& group,
                                std::uint32_t tile, std::uint32_t tile_end, std::int32_t split, std::int32_t client) {
  struct Lane {
    float sum[kGroupEntries];
    float bias;
  };
  typename Warp::template PerLane<Lane> state;
  const bool sums_bias = a.with_bias && group.first_of_row != 0;
  if (group.count == 0 && !sums_bias) return;

  // Stage.
  warp.lanes([&](int lane) {
    Lane& own = state[lane];
    own.bias = 0.0f;
    FEDPAI_DEVICE_UNROLL
    for (int e = 0; e < kGroupEntries; ++e) own.sum[e] = 0.0f;
    if (lane >= group.count) return;
    const Entry entry = a.entries[group.begin + lane];
    scratch->records[lane] = {0.0f, element_at(entry.column, entry.dy, entry.dx, a.in_h, a.in_w, a.batch), entry.dy, entry.dx};
  });

  // Walk the tiles.
  warp.lanes([&](int lane) {
    Lane& own = state[lane];
    FEDPAI_DEVICE_ROLLED
    for (std::uint32_t t = tile; t < tile_end; ++t) {
      const Place place = place_of<V, P>(a.tiles, t, lane);
      const bool live = place.y < a.out_h && place.n < a.batch;
      const auto n = static_cast<std::uint32_t>(place.n);
      const std::uint32_t at = element_at(client * a.rows + group.row, place.y, place.x, a.out_h, a.out_w, a.batch) + n;
      Floats<V> grad[P];
      FEDPAI_DEVICE_UNROLL
      for (int p = 0; p < P; ++p) {
        const bool inside = live && place.x + p < a.out_w;
        grad[p] = inside ? load<V>(a.dy + (at + static_cast<std::uint32_t>(p) * static_cast<std::uint32_t>(a.batch))) : zeros<V>();
      }
      if (sums_bias) {
        FEDPAI_DEVICE_UNROLL
        for (int p = 0; p < P; ++p) {
          FEDPAI_DEVICE_UNROLL
          for (int v = 0; v < V; ++v) own.bias += grad[p].at[v];
        }
      }
      const std::int32_t y = place.y * a.stride_h, x = place.x * a.stride_w;
      const SourceStrip strip{element_at(client * a.columns, y, x, a.in_h, a.in_w, a.batch) + n,
                              static_cast<std::uint32_t>(a.stride_w) * static_cast<std::uint32_t>(a.batch), y, x, a.stride_w, live};
      FEDPAI_DEVICE_UNROLL
      for (int e = 0; e < kGroupEntries; ++e) {
        if (e >= group.count) break;
        Floats<V> loaded[P];
        load_strip<V, P>(a.x, strip, scratch->records[e], a.in_h, a.in_w, loaded);
        FEDPAI_DEVICE_UNROLL
        for (int p = 0; p < P; ++p) {
          FEDPAI_DEVICE_UNROLL
          for (int v = 0; v < V; ++v) own.sum[e] = fused_multiply_add(grad[p].at[v], loaded[p].at[v], own.sum[e]);
        }
      }
    }
    FEDPAI_DEVICE_UNROLL
    for (int e = 0; e < kGroupEntries; ++e) scratch->sums[e][lane] = own.sum[e];
    scratch->sums[kGroupEntries][lane] = own.bias;
  });

  // Add the lanes up: one lane per sum, in the order of the lanes.
  warp.lanes([&](int lane) {
    const bool is_bias = lane == kGroupEntries;
    if (is_bias ? !sums_bias : lane >= group.count) return;
    float total = 0.0f;
    for (int other = 0; other < kWarp; ++other) total += scratch->sums[lane][other];
    const std::int64_t slot = is_bias ? std::int64_t{a.entry_count} + group.row : std::int64_t{group.begin} + lane;
    a.partial[(std::int64_t{client} * a.splits + split) * a.split_size() + slot] = total;
  });
}

struct SplitRange {
  std::uint32_t begin, end;
};

// The tiles of one split of several: equal shares, the first ones longer by one where that leaves a rest.
FEDPAI_DEVICE SplitRange tiles_of_split(std::uint32_t tiles, std::uint32_t splits, std::uint32_t split) {
  const std::uint32_t share = tiles / splits, rest = tiles - share * splits;
  const std::uint32_t begin = split * share + (split < rest ? split : rest);
  return {begin, begin + share + (split < rest ? 1u : 0u)};
}

struct FinishArgs {
  const float* partial;
  const Entry* entries;
  float* dvalues;
  float* dbias;  // null: none
  std::int32_t entry_count, rows, splits;
};

// The second pass, of one element of client `client`: entry `slot`, or behind the entries the bias of a row.
FEDPAI_DEVICE void add_splits(const FinishArgs& a, std::int64_t slot, std::int64_t client) {
  const std::int64_t size = std::int64_t{a.entry_count} + a.rows;
  if (slot >= size || (slot >= a.entry_count && a.dbias == nullptr)) return;
  float total = 0.0f;
  for (std::int64_t split = client * a.splits; split < (client + 1) * a.splits; ++split) total += a.partial[split * size + slot];
  if (slot < a.entry_count) {
    a.dvalues[client * a.entry_count + a.entries[slot].value] = total;
  } else {
    a.dbias[client * a.rows + slot - a.entry_count] = total;
  }
}

}  // namespace fedpai::cuda
