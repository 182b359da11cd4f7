// SPDX-License-Identifier: Apache-2.0
// Batch norm over the rows of batch-last activations, with an optional residual r and an optional activation f.
//
//   forward    y = f((x - mean) * scale + shift + r)           scale = weight / sqrt(var + eps), shift = bias
//   backward   g = f'(...) * dy,  dr = g
//              dx = (g - mean(g) - (x - mean) * mean(g * (x - mean)) / (var + eps)) * scale       the batch's statistics
//              dx = g * scale                                                                     given statistics
//              dweight = sum(g * (x - mean)) / sqrt(var + eps),  dbias = sum(g)
//
// Layout: a channel is one row of H*W*N elements side by side; x, r, y, dy, z, dx, dr are [channels][row], float32 or
// BFloat16. Parameters, statistics and their gradients are float32, [channels]. All arithmetic is float32, and float64
// where blocks of a row are put together. Outputs are overwritten; dx may be dy.
//
// g is taken from x again where f is piecewise linear; with a residual from the result z, which the next layer keeps
// anyway; where f is smooth (SiLU, GELU) from x and from r, which z is then. In the latter two cases the first look rounds g to
// the activations' type, as a separate activation would, and leaves it, in dr or in dx, for the second look: that is the
// residual's gradient as it stands, and the second look needs neither dy nor z.
//
// Bound: memory. Rows read + written, of which the second read of a row comes from L2, or with one thread block a row
// from L1, where they hold it:
//
//   forward, the batch's statistics     x twice [and r]; y            2 + 1, with a residual 3 + 1
//   forward, given statistics           x [and r]; y                  1 + 1, 2 + 1
//   backward, the batch's statistics    dy, x [, z; g | g], x; dx     4 + 1, with a residual 5 + 2
//   backward, given statistics          dy, x [, z]; dx [, g]         2 + 1, 3 + 2
//
// Floors of an H100 (3.35 TB/s), 64 channels at 32 x 32, batch 128, float32 (33.6 MB a row of all channels): forward and
// backward with the batch's statistics 30 and 50 us of DRAM, 20 and 30 where the second read comes from L2. 512 channels
// at 4 x 4 (4.2 MB): 3 and 4 us, so the launch decides: there is one for each.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
#pragma once

#include "cuda/norm/activation.cuh"
#include "cuda/norm/statistics.cuh"

namespace fedpai::cuda {

// Vectors that a lane has under way at a time, of each operand. Smooth activations compute for longer, and need registers.
template <ActivationKind Kind>
constexpr int kForwardTogether = Kind < kPiecewiseKinds ? 4 : 2;
template <int V, ActivationKind Kind>
constexpr int kBackwardTogether = (V == 1 ? 4 : 2) / (Kind < kPiecewiseKinds ? 1 : 2);

// What a channel's row goes through before residual and activation.
struct ChannelMap {
  float mean, scale, shift;

  FEDPAI_DEVICE float operator()(float x) const { return fused_multiply_add(x - mean, scale, shift); }
};

FEDPAI_DEVICE ChannelMap channel_map(const float* weight, const float* bias, float mean, float invstd, std::int64_t channel) {
  return {mean, weight != nullptr ? weight[channel] * invstd : invstd, bias != nullptr ? bias[channel] : 0.0f};
}

// ---- forward ----------------------------------------------------------------------------------------------------

enum class Statistics {
  kOfBatch,  // from `partial`; written to stats [3][channels]: mean, 1 / sqrt(var + eps), unbiased variance
  kGiven,    // given_mean and given_var; written to stats [2][channels]
  kKept,     // stats, as either of these left them
};

template <class T>
struct NormForwardArgs {
  const T* x;
  const T* r;  // null: none
  T* y;
  const float* weight;  // null: 1
  const float* bias;    // null: 0
  const float* given_mean;
  const float* given_var;
  float* stats;
  float* running_mean;  // null: none; else they take the batch's statistics in
  float* running_var;
  BlockSums* partial;  // [channels][blocks]
  double eps, momentum;
  std::int64_t channels, row;
  std::int32_t blocks;  // of a row
  int kind;
  float slope;
  Statistics source;
};

// running + momentum * (batch - running), as torch's lerp rounds it.
FEDPAI_DEVICE float taken_in(float running, float batch, double momentum) {
  const auto share = static_cast<float>(momentum);
  const float difference = batch - running;
  return std::fabs(share) < 0.5f ? fused_multiply_add(share, difference, running)
                                 : fused_multiply_add(share - 1.0f, difference, batch);
}

// A channel's map; `writes`: whether this warp is the one that writes what is new about its statistics.
template <class T, class Warp>
FEDPAI_DEVICE ChannelMap forward_map(const NormForwardArgs<T>& a, const Warp& warp, std::int64_t channel, bool writes) {
  float* const mean_at = a.stats + channel;
  float* const invstd_at = mean_at + a.channels;
  if (a.source == Statistics::kKept) return channel_map(a.weight, a.bias, *mean_at, *invstd_at, channel);
  RowMoments moments{};
  double variance;
  if (a.source == Statistics::kOfBatch) {
    moments = combine_moments(a.partial + channel * a.blocks, a.row, a.blocks, warp);
    variance = moments.m2 / static_cast<double>(a.row);
  } else {
    moments.mean = static_cast<double>(a.given_mean[channel]);
    variance = static_cast<double>(a.given_var[channel]);
  }
  const auto mean = static_cast<float>(moments.mean), invstd = static_cast<float>(1.0 / std::sqrt(variance + a.eps));
  warp.lanes([&](int lane) {
    if (lane != 0 || !writes) return;
    *mean_at = mean;
    *invstd_at = invstd;
    if (a.source != Statistics::kOfBatch) return;
    const auto unbiased = static_cast<float>(moments.m2 / (static_cast<double>(a.row) - 1.0));
    invstd_at[a.channels] = unbiased;
    if (a.running_mean != nullptr) a.running_mean[channel] = taken_in(a.running_mean[channel], mean, a.momentum);
    if (a.running_var != nullptr) a.running_var[channel] = taken_in(a.running_var[channel], unbiased, a.momentum);
  });
  return channel_map(a.weight, a.bias, mean, invstd, channel);
}

// y of block `index` of a channel.
template <int V, class T, class Warp>
FEDPAI_DEVICE void normalise_block(const NormForwardArgs<T>& a, const Warp& warp, const ChannelMap& map, std::int64_t channel,
                                   std::int32_t index) {
  const RowBlock block(channel, a.row, index);
  with_kind(a.kind, [&](auto kind) {
    constexpr ActivationKind Kind = decltype(kind)::value;
    constexpr int together = kForwardTogether<Kind>;
    warp.lanes([&](int lane) {
      FEDPAI_DEVICE_ROLLED
      for (int first = 0; first < kLaneVectors<V>; first += together) {
        Floats<V> x[together], r[together];
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          x[k] = i < block.count ? load<V>(a.x + (block.at + i)) : zeros<V>();
          r[k] = i < block.count && a.r != nullptr ? load<V>(a.r + (block.at + i)) : zeros<V>();
        }
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          if (i >= block.count) break;
          FEDPAI_DEVICE_UNROLL
          for (int v = 0; v < V; ++v) {
            float y = map(x[k].at[v]);
            if (a.r != nullptr) y = y + r[k].at[v];
            x[k].at[v] = activated<Kind>(y, a.slope);
          }
          store(a.y + (block.at + i), x[k]);
        }
      }
    });
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct NormBackwardArgs {
  const T* dy;
  const T* x;
  const T* z;  // null: no residual, or one without an activation; else the result, or the residual where f is smooth
  T* dx;       // null: not wanted; may be dy
  T* dr;       // null: not wanted
  T* kept;     // where the first look leaves g for the second one: dr or dx; null: g is computed again
  const float* weight;  // null: 1
  const float* bias;    // null: 0
  const float* stats;   // mean, and then 1 / sqrt(var + eps)
  float* dweight;       // null, as dbias then: not wanted
  float* dbias;
  BlockSums* partial;  // [channels][blocks]
  std::int64_t channels, row;
  std::int32_t blocks;
  int kind;
  float slope;
  bool through_statistics;  // whether stats are those of x
  bool wants_sums;

  FEDPAI_DEVICE bool is_smooth() const { return kind >= kPiecewiseKinds; }
  FEDPAI_DEVICE bool rounds_g() const { return z != nullptr || is_smooth(); }
  FEDPAI_DEVICE bool has_second_look() const { return through_statistics && dx != nullptr; }
};

template <class T>
FEDPAI_DEVICE ChannelMap backward_map(const NormBackwardArgs<T>& a, std::int64_t channel) {
  return channel_map(a.weight, a.bias, a.stats[channel], a.stats[a.channels + channel], channel);
}

FEDPAI_DEVICE float rounded_as(float x, const float*) { return x; }
FEDPAI_DEVICE float rounded_as(float x, const BFloat16*) { return float_of_bits(rounded_to_bf16(x) << 16); }

// First look at a block: g, the sums, and all that needs no sums.
template <int V, class T, class Warp>
FEDPAI_DEVICE void reduce_gradient(const NormBackwardArgs<T>& a, const Warp& warp, const ChannelMap& map, std::int64_t channel,
                                   std::int32_t index) {
  struct Lane {
    float g, g_xc;
  };
  typename Warp::template PerLane<Lane> state;
  const RowBlock block(channel, a.row, index);
  const bool rounds = a.rounds_g();
  const bool reads_x = a.wants_sums || (a.kind != kNone && (a.z == nullptr || a.is_smooth()));
  T* const to_g = a.dr != nullptr ? a.dr : a.kept;
  T* const to_dx = a.through_statistics ? nullptr : a.dx;
  with_kind(a.kind, [&](auto kind) {
    constexpr ActivationKind Kind = decltype(kind)::value;
    constexpr int together = kBackwardTogether<V, Kind>;
    warp.lanes([&](int lane) {
      LaneSum sum, sum_xc;
      FEDPAI_DEVICE_ROLLED
      for (int first = 0; first < kLaneVectors<V>; first += together) {
        Floats<V> dy[together], x[together], z[together];
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          const bool inside = i < block.count;
          dy[k] = inside ? load<V>(a.dy + (block.at + i)) : zeros<V>();
          x[k] = inside && reads_x ? load<V>(a.x + (block.at + i)) : zeros<V>();
          z[k] = inside && a.z != nullptr ? load<V>(a.z + (block.at + i)) : zeros<V>();
        }
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          if (i >= block.count) break;
          FEDPAI_DEVICE_UNROLL
          for (int v = 0; v < V; ++v) {
            float at = z[k].at[v];
            if constexpr (Kind >= kPiecewiseKinds) {
              at = a.z != nullptr ? map(x[k].at[v]) + at : map(x[k].at[v]);
            } else if (Kind != kNone && a.z == nullptr) {
              at = map(x[k].at[v]);
            }
            float g = pulled<Kind>(at, dy[k].at[v], a.slope);
            if (rounds) g = rounded_as(g, static_cast<const T*>(nullptr));
            const int part = (k * V + v) % 4;
            sum.part[part] += g;
            sum_xc.part[part] = fused_multiply_add(g, x[k].at[v] - map.mean, sum_xc.part[part]);
            dy[k].at[v] = g;
          }
          if (to_g != nullptr) store(to_g + (block.at + i), dy[k]);
          if (to_dx != nullptr) {
            FEDPAI_DEVICE_UNROLL
            for (int v = 0; v < V; ++v) dy[k].at[v] = dy[k].at[v] * map.scale;
            store(to_dx + (block.at + i), dy[k]);
          }
        }
      }
      state[lane] = {sum.total(), sum_xc.total()};
    });
  });
  if (!a.wants_sums) return;
  warp.add_up([&](int lane) -> float& { return state[lane].g; });
  warp.add_up([&](int lane) -> float& { return state[lane].g_xc; });
  warp.lanes([&](int lane) {
    if (lane != 0) return;
    a.partial[channel * a.blocks + index] = {static_cast<double>(state[lane].g), static_cast<double>(state[lane].g_xc)};
  });
}

// dx = (g - mean_g - (x - mean) * slope) * scale
struct ChannelPull {
  float mean_g, slope;
};

// A channel's pull, from the sums of its blocks; `writes`: whether this warp writes the gradients of weight and bias.
template <class T, class Warp>
FEDPAI_DEVICE ChannelPull backward_pull(const NormBackwardArgs<T>& a, const Warp& warp, std::int64_t channel, bool writes) {
  const BlockSums sums = combine_sums(a.partial + channel * a.blocks, a.blocks, warp);
  const auto invstd = static_cast<double>(a.stats[a.channels + channel]), count = static_cast<double>(a.row);
  warp.lanes([&](int lane) {
    if (lane != 0 || !writes || a.dweight == nullptr) return;
    a.dweight[channel] = static_cast<float>(sums.second * invstd);
    a.dbias[channel] = static_cast<float>(sums.first);
  });
  return {static_cast<float>(sums.first / count), static_cast<float>(sums.second * invstd * invstd / count)};
}

// Second look at a block: dx through the statistics.
template <int V, class T, class Warp>
FEDPAI_DEVICE void pull_block(const NormBackwardArgs<T>& a, const Warp& warp, const ChannelMap& map, const ChannelPull& pull,
                              std::int64_t channel, std::int32_t index) {
  const RowBlock block(channel, a.row, index);
  const T* const from = a.kept != nullptr ? a.kept : a.dy;
  with_piecewise(a.kept != nullptr ? kNone : a.kind, [&](auto kind) {
    constexpr ActivationKind Kind = decltype(kind)::value;
    constexpr int together = kBackwardTogether<V, Kind>;
    warp.lanes([&](int lane) {
      FEDPAI_DEVICE_ROLLED
      for (int first = 0; first < kLaneVectors<V>; first += together) {
        Floats<V> g[together], x[together];
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          const bool inside = i < block.count;
          g[k] = inside ? load<V>(from + (block.at + i)) : zeros<V>();
          x[k] = inside ? load<V>(a.x + (block.at + i)) : zeros<V>();
        }
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const int i = element_of<V>(first + k, lane);
          if (i >= block.count) break;
          FEDPAI_DEVICE_UNROLL
          for (int v = 0; v < V; ++v) {
            const float own = pulled<Kind>(map(x[k].at[v]), g[k].at[v], a.slope);
            x[k].at[v] = fused_multiply_add(x[k].at[v] - map.mean, -pull.slope, own - pull.mean_g) * map.scale;
          }
          store(a.dx + (block.at + i), x[k]);
        }
      }
    });
  });
}

}  // namespace fedpai::cuda
