// SPDX-License-Identifier: Apache-2.0
// Merging the vectors w_k of clients k with weights n_k, for a whole model in one launch.
//
//   mean         out_j = sum_k n_k w_kj / sum_k n_k
//   masked mean  out_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj ;  old_j where nobody keeps j
//   majority     bit j of out = [number of bitmaps with bit j set >= threshold]
//
// The same formulas, order and rounding as on the CPU (csrc/cpu/aggregate/kernels-inl.h), so the same bits: sums are
// float64, over the clients in their order, a product and a sum are two operations, and the result is rounded to float32
// once. Compensated: what each addition rounds away (TwoSum) is summed beside and added at the end.
//
// Layout: under a shared mask, or none, vectors are the rows of a matrix, `stride` elements apart. Under masks of their
// own, clients' values lie one client behind the other, and so do their positions; offsets[k] is where client k begins,
// offsets[clients] where the last one ends.
//
// Mean: a thread is an element, so a warp reads whole lines of every client.
// Masked mean: a warp owns a segment of the elements, whose sums and weights stay in shared memory while one client after
// the other is added to them, lanes apart by position; the order of the clients is that of the warp's steps, without
// atomics. Where each client's values of a segment begin is found by a launch of its own, once for a set of masks, which
// checks the positions in passing. As masks stay as they are for rounds, that is seldom.
// Majority: a thread counts the votes for 32 positions at once, in bit planes.
//
// Bound: memory. Bytes moved: mean 4 per value; masked mean 8 per value (with its position), 8 per element and 4 per
// client and segment; majority one bit per client and element. Operations: 2 float64 per value. 100 clients' ResNet18
// (11.2 million weights) at 98 %: shared mask 90 MB, so 27 us at 3.35 TB/s; masks of their own 180 + 90 + 4 MB, so 82 us.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
#pragma once

#include "cuda/common/device.h"
#include "cuda/common/warp.h"

namespace fedpai::cuda {

// sum += term; compensated: what that rounds away is added to lost.
template <bool Compensated>
FEDPAI_DEVICE void add_term(double& sum, double term, double& lost) {
  const double total = sum + term;
  if constexpr (Compensated) {
    const double taken = total - sum;
    lost = lost + ((sum - (total - taken)) + (term - taken));
  }
  sum = total;
}

template <bool Compensated>
FEDPAI_DEVICE float quotient(double sum, double lost, double weight) {
  if constexpr (Compensated) sum = sum + lost;
  return static_cast<float>(sum / weight);
}

// ---- mean -------------------------------------------------------------------------------------------------------

struct MeanArgs {
  const float* vectors;
  const double* weights;
  float* out;
  std::int64_t stride, n;
  std::int32_t clients;
};

// Clients whose values a thread has under way at a time.
constexpr int kClientsInFlight = 4;

template <bool Compensated>
FEDPAI_DEVICE void mean_element(const MeanArgs& a, std::int64_t j) {
  if (j >= a.n) return;
  double sum = 0, lost = 0, weight = 0;
  std::int32_t k = 0;
  FEDPAI_DEVICE_ROLLED
  for (; k + kClientsInFlight <= a.clients; k += kClientsInFlight) {
    float value[kClientsInFlight];
    FEDPAI_DEVICE_UNROLL
    for (int c = 0; c < kClientsInFlight; ++c) value[c] = a.vectors[(k + c) * a.stride + j];
    FEDPAI_DEVICE_UNROLL
    for (int c = 0; c < kClientsInFlight; ++c) {
      add_term<Compensated>(sum, a.weights[k + c] * static_cast<double>(value[c]), lost);
      weight += a.weights[k + c];
    }
  }
  FEDPAI_DEVICE_ROLLED
  for (; k < a.clients; ++k) {
    add_term<Compensated>(sum, a.weights[k] * static_cast<double>(a.vectors[k * a.stride + j]), lost);
    weight += a.weights[k];
  }
  a.out[j] = quotient<Compensated>(sum, lost, weight);
}

// ---- segments ---------------------------------------------------------------------------------------------------

constexpr std::int32_t kSegment = 1024;  // elements; a power of two

inline std::int64_t segments_of(std::int64_t n) { return (n + kSegment - 1) / kSegment; }

struct SegmentArgs {
  const std::int32_t* positions;
  const std::int64_t* offsets;
  std::int32_t* begins;  // [segments + 1][clients]: number of the client's first value at or behind the segment's start
  std::int32_t* wrong;   // [clients]: set to 1 where positions are not ascending, without repeats and within [0, n)
  std::int32_t n, clients, segments;
};

// Value number i of client k, or what is behind its last one: writes the segments that begin between it and the one before.
FEDPAI_DEVICE void find_segments(const SegmentArgs& a, std::int32_t k, std::int64_t i) {
  const std::int64_t first = a.offsets[k], count = a.offsets[k + 1] - first;
  if (i > count) return;
  const std::int32_t* const positions = a.positions + first;
  const std::int32_t before = i > 0 ? positions[i - 1] : -1;
  const std::int32_t at = i < count ? positions[i] : a.n;
  // A position before that is wrong is told by its own thread.
  if (i < count && (at <= before || at < 0 || at >= a.n)) {
    a.wrong[k] = 1;
    return;
  }
  if (before < -1 || before >= a.n) return;
  const std::int32_t last = i < count ? at / kSegment : a.segments;
  for (std::int32_t s = before < 0 ? 0 : before / kSegment + 1; s <= last; ++s) {
    a.begins[static_cast<std::int64_t>(s) * a.clients + k] = static_cast<std::int32_t>(i);
  }
}

// ---- masked mean ------------------------------------------------------------------------------------------------

struct MaskedMeanArgs {
  const float* values;
  const std::int32_t* positions;
  const std::int64_t* offsets;
  const std::int32_t* begins;
  const double* weights;
  const float* old;
  float* out;  // may be old
  std::int32_t n, clients;
};

template <bool Compensated>
struct SegmentSums {
  // An element's sum and weight side by side: values come scattered, and one access then reaches both.
  struct Pair {
    double sum, weight;
  };
  Pair at[kSegment];
  double lost[Compensated ? kSegment : 1];
};

// Merges segment `segment`. sums: of this warp alone.
template <bool Compensated, class Warp>
FEDPAI_DEVICE void merge_segment(const MaskedMeanArgs& a, const Warp& warp, SegmentSums<Compensated>* sums, std::int32_t segment) {
  struct Lane {
    // The lane's next value of some clients, read ahead; at: element of the segment, or one behind the last for none.
    float value[kClientsInFlight];
    std::uint32_t at[kClientsInFlight];
  };
  typename Warp::template PerLane<Lane> state;
  const std::int32_t base = segment * kSegment;
  const auto size = static_cast<std::uint32_t>(a.n - base < kSegment ? a.n - base : kSegment);
  const std::int32_t* const begins = a.begins + static_cast<std::int64_t>(segment) * a.clients;
  const std::int32_t* const ends = begins + a.clients;

  const auto read = [&](std::int32_t k, std::int32_t i, float& value, std::uint32_t& at) {
    const bool is_there = k < a.clients && i < ends[k];
    const std::int64_t place = is_there ? a.offsets[k] + i : 0;
    at = is_there ? static_cast<std::uint32_t>(a.positions[place] - base) : size;
    value = is_there ? a.values[place] : 0.0f;
  };
  // What lies outside the segment was told when the segments were found, and is left out.
  const auto add = [&](double weight, float value, std::uint32_t at) {
    if (at >= size) return;
    double unused = 0;
    double& lost = Compensated ? sums->lost[at] : unused;
    typename SegmentSums<Compensated>::Pair& pair = sums->at[at];
    add_term<Compensated>(pair.sum, weight * static_cast<double>(value), lost);
    pair.weight += weight;
  };

  warp.lanes([&](int lane) {
    for (int e = lane; e < kSegment; e += kWarp) {
      sums->at[e] = {0, 0};
      if constexpr (Compensated) sums->lost[e] = 0;
    }
  });
  for (std::int32_t k = 0; k < a.clients; k += kClientsInFlight) {
    warp.lanes([&](int lane) {
      FEDPAI_DEVICE_UNROLL
      for (int c = 0; c < kClientsInFlight; ++c) {
        const std::int32_t begin = k + c < a.clients ? begins[k + c] : 0;
        read(k + c, begin + lane, state[lane].value[c], state[lane].at[c]);
      }
    });
    FEDPAI_DEVICE_UNROLL
    for (int c = 0; c < kClientsInFlight; ++c) {
      if (k + c >= a.clients) break;
      warp.lanes([&](int lane) {
        const double weight = a.weights[k + c];
        add(weight, state[lane].value[c], state[lane].at[c]);
        for (std::int32_t i = begins[k + c] + kWarp + lane; i < ends[k + c]; i += kWarp) {
          float value;
          std::uint32_t at;
          read(k + c, i, value, at);
          add(weight, value, at);
        }
      });
    }
  }
  warp.lanes([&](int lane) {
    for (auto e = static_cast<std::uint32_t>(lane); e < size; e += kWarp) {
      const typename SegmentSums<Compensated>::Pair pair = sums->at[e];
      const double lost = Compensated ? sums->lost[e] : 0.0;
      const std::int64_t j = std::int64_t{base} + e;
      a.out[j] = pair.weight > 0 ? quotient<Compensated>(pair.sum, lost, pair.weight) : a.old[j];
    }
  });
}

// ---- majority ---------------------------------------------------------------------------------------------------

struct MajorityArgs {
  const std::uint8_t* bitmaps;
  std::uint8_t* out;
  std::int64_t stride, bytes;
  std::int32_t clients, threshold;
};

constexpr int kVotePlanes = 16;
constexpr std::int32_t kMostVoters = (1 << kVotePlanes) - 1;
constexpr int kVoteBytes = 4;  // of a thread

// Bytes 4 i to 4 i + 3. Votes are counted in bit planes: bit j of plane p is bit p of the number of votes for j.
FEDPAI_DEVICE void vote(const MajorityArgs& a, std::int64_t i) {
  const std::int64_t first = i * kVoteBytes;
  if (first >= a.bytes) return;
  const int count = a.bytes - first < kVoteBytes ? static_cast<int>(a.bytes - first) : kVoteBytes;
  std::uint32_t plane[kVotePlanes];
  FEDPAI_DEVICE_UNROLL
  for (int p = 0; p < kVotePlanes; ++p) plane[p] = 0;
  for (std::int32_t k = 0; k < a.clients; ++k) {
    const std::uint8_t* const from = a.bitmaps + k * a.stride + first;
    std::uint32_t carry = 0;  // of this client's bits, and then of each plane
    FEDPAI_DEVICE_UNROLL
    for (int b = 0; b < kVoteBytes; ++b) carry |= b < count ? static_cast<std::uint32_t>(from[b]) << (8 * b) : 0;
    FEDPAI_DEVICE_UNROLL
    for (int p = 0; p < kVotePlanes; ++p) {
      if ((k + 1) >> p == 0) break;  // no position has so many votes yet
      const std::uint32_t both = plane[p] & carry;
      plane[p] ^= carry;
      carry = both;
    }
  }
  // [votes >= threshold], from the lowest plane to the highest: a higher plane decides unless it is equal.
  std::uint32_t elected = 0xffffffffu;
  FEDPAI_DEVICE_UNROLL
  for (int p = 0; p < kVotePlanes; ++p) elected = a.threshold >> p & 1 ? plane[p] & elected : plane[p] | elected;
  for (int b = 0; b < count; ++b) a.out[first + b] = static_cast<std::uint8_t>(elected >> (8 * b));
}

}  // namespace fedpai::cuda
