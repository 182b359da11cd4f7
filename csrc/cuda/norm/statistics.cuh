// SPDX-License-Identifier: Apache-2.0
// Sums of a channel's row, in two steps of fixed order: a warp reduces a block of the row, and one warp the blocks.
//
//   moments     of a block: its mean, and the sum of the squared deviations about it
//               of a row:   mean = sum n_b mean_b / n,   m2 = sum (m2_b + n_b (mean_b - mean)^2)
//   sums        of a block and of a row: of the gradient g, and of g * (x - mean)
//
// A block is 1024 elements, 32 for each lane, which stay in registers: x is read once, its mean is taken, and then the squares
// about that. The deviations are summed beside them, to correct for what rounding took from the mean. A lane adds up 32 or fewer
// float32 terms, the lanes are added by halves, and blocks in float64. E[x^2] - E[x]^2, which cancels, appears nowhere.
// Nothing is added atomically: the bits depend on the row alone, neither on the device nor on how a launch is cut.
#pragma once

#include "cuda/common/vector.h"
#include "cuda/common/warp.h"

namespace fedpai::cuda {

constexpr int kRowBlock = 1024;  // elements

// Vectors of a block that a lane has: number k of them is vector k * kWarp + lane of the block.
template <int V>
constexpr int kLaneVectors = kRowBlock / (kWarp * V);

// Of one block: mean and m2 as (first, second), or the sums of g and of g * (x - mean).
struct alignas(16) BlockSums {
  double first, second;
};

inline std::int64_t blocks_of_row(std::int64_t row) { return (row + kRowBlock - 1) / kRowBlock; }

// Block `index` of a channel's row.
struct RowBlock {
  std::int64_t at;  // of its first element in the whole tensor
  int count;        // elements

  FEDPAI_DEVICE RowBlock(std::int64_t channel, std::int64_t row, std::int32_t index) {
    const std::int64_t begin = static_cast<std::int64_t>(index) * kRowBlock;
    at = channel * row + begin;
    count = row - begin < kRowBlock ? static_cast<int>(row - begin) : kRowBlock;
  }
};

// First element of a lane's vector number k.
template <int V>
FEDPAI_DEVICE int element_of(int k, int lane) {
  return (k * kWarp + lane) * V;
}

// Four sums side by side, so that an addition need not wait for the one before.
struct LaneSum {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  FEDPAI_DEVICE float total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// ---- blocks -----------------------------------------------------------------------------------------------------

// The moments of a block of x.
template <int V, class T, class Warp>
FEDPAI_DEVICE void reduce_moments(const T* x, const RowBlock& block, const Warp& warp, BlockSums* result) {
  struct Lane {
    Floats<V> x[kLaneVectors<V>];
    float sum, deviation, square;
  };
  typename Warp::template PerLane<Lane> state;

  // Load, and sum.
  warp.lanes([&](int lane) {
    Lane& own = state[lane];
    LaneSum sum;
    FEDPAI_DEVICE_UNROLL
    for (int k = 0; k < kLaneVectors<V>; ++k) {
      const int i = element_of<V>(k, lane);
      own.x[k] = i < block.count ? load<V>(x + (block.at + i)) : zeros<V>();
    }
    FEDPAI_DEVICE_UNROLL
    for (int k = 0; k < kLaneVectors<V>; ++k) {
      FEDPAI_DEVICE_UNROLL
      for (int v = 0; v < V; ++v) sum.part[(k * V + v) % 4] += own.x[k].at[v];
    }
    own.sum = sum.total();
  });
  warp.add_up([&](int lane) -> float& { return state[lane].sum; });

  // Squares about the mean.
  warp.lanes([&](int lane) {
    Lane& own = state[lane];
    const float centre = own.sum / static_cast<float>(block.count);
    LaneSum deviation, square;
    FEDPAI_DEVICE_UNROLL
    for (int k = 0; k < kLaneVectors<V>; ++k) {
      const bool inside = element_of<V>(k, lane) < block.count;
      FEDPAI_DEVICE_UNROLL
      for (int v = 0; v < V; ++v) {
        const int part = (k * V + v) % 4;
        const float d = inside ? own.x[k].at[v] - centre : 0.0f;
        deviation.part[part] += d;
        square.part[part] = fused_multiply_add(d, d, square.part[part]);
      }
    }
    own.deviation = deviation.total();
    own.square = square.total();
  });
  warp.add_up([&](int lane) -> float& { return state[lane].deviation; });
  warp.add_up([&](int lane) -> float& { return state[lane].square; });

  // Correct, and write.
  warp.lanes([&](int lane) {
    if (lane != 0) return;
    const Lane& own = state[lane];
    const float centre = own.sum / static_cast<float>(block.count);
    const double off = static_cast<double>(own.deviation) / block.count;
    const double m2 = static_cast<double>(own.square) - static_cast<double>(own.deviation) * off;
    *result = {static_cast<double>(centre) + off, m2 < 0.0 ? 0.0 : m2};
  });
}

// ---- rows -------------------------------------------------------------------------------------------------------

// sum over the blocks of term(block), in all lanes: each lane takes every 32nd block.
template <class Warp, class Term>
FEDPAI_DEVICE double add_blocks(std::int32_t blocks, const Warp& warp, const Term& term) {
  typename Warp::template PerLane<double> sum;
  warp.lanes([&](int lane) {
    double own = 0.0;
    for (std::int32_t b = lane; b < blocks; b += kWarp) own += term(b);
    sum[lane] = own;
  });
  warp.add_up([&](int lane) -> double& { return sum[lane]; });
  return sum[0];
}

struct RowMoments {
  double mean, m2;
};

// From the moments of a row's blocks.
template <class Warp>
FEDPAI_DEVICE RowMoments combine_moments(const BlockSums* of_row, std::int64_t row, std::int32_t blocks, const Warp& warp) {
  const auto count = [&](std::int32_t b) { return static_cast<double>(RowBlock(0, row, b).count); };
  const double mean = add_blocks(blocks, warp, [&](std::int32_t b) { return count(b) * of_row[b].first; }) / static_cast<double>(row);
  const double m2 = add_blocks(blocks, warp, [&](std::int32_t b) {
    const double off = of_row[b].first - mean;
    return of_row[b].second + count(b) * (off * off);
  });
  return {mean, m2};
}

// From the sums of a row's blocks: their sums.
template <class Warp>
FEDPAI_DEVICE BlockSums combine_sums(const BlockSums* of_row, std::int32_t blocks, const Warp& warp) {
  const double first = add_blocks(blocks, warp, [&](std::int32_t b) { return of_row[b].first; });
  return {first, add_blocks(blocks, warp, [&](std::int32_t b) { return of_row[b].second; })};
}

}  // namespace fedpai::cuda
