// SPDX-License-Identifier: Apache-2.0
// Merging the vectors w_k of clients k with weights n_k, in one pass over them.
//
//   mean         out_j = sum_k n_k w_kj / sum_k n_k
//   masked mean  out_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj ;  old_j where nobody keeps j
//   majority     bit j of out = [number of bitmaps with bit j set >= threshold]
//
// Sums are float64, in the order of the clients, rounded to float32 once, after the division. A product and a sum are
// two operations on every instruction set, so the bits depend on nothing but the operands and the order of the clients.
// While weights are whole numbers below 2^29, products are exact. Compensated: what each addition rounds away (TwoSum,
// Knuth, The Art of Computer Programming 2, section 4.2.2) is summed beside and added at the end, which doubles the
// digits of the sum (Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26(6), 2005).
//
// Layout: clients' vectors lie anywhere; a masked one holds its values in the order of their positions. Elements are cut
// into blocks whose sums stay in a cache near the core while one client after the other is added to them, several in a
// sweep where vectors are dense. So each value is read once and each result written once. What comes next of masked
// vectors is asked for early, because their runs are too short for the hardware to see them coming.
// Bound: memory. Bytes moved: mean 4 per value; masked mean 8 per value (with its position) and 8 per element; majority
// one bit per client and element.
#pragma once

#include "cpu/aggregate/kernels.h"
#include "cpu/aggregate/step_kernels-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

constexpr std::int64_t kMeanBlock = 2048;    // elements: runs of two pages, which the hardware fetches ahead by itself
constexpr std::int64_t kMaskedBlock = 4096;  // elements
constexpr std::int64_t kFinished = 64;       // elements whose sums and weights are parted at a time
constexpr std::int64_t kVoteBlock = 64;      // words of 64 bits
constexpr int kVectorsPerSweep = 8;
constexpr std::int64_t kClientsAhead = 3;    // whose values are asked for
constexpr int kLineFloats = 16;  // of a cache line

// What Vec<double> offers, for one element: the ends of vectors go through the same operations.
struct OneDouble {
  using reg = double;
  static constexpr int lanes = 1;
  static FEDPAI_INLINE reg zero() { return 0.0; }
  static FEDPAI_INLINE reg set1(double x) { return x; }
  static FEDPAI_INLINE reg loadu(const double* p) { return *p; }
  static FEDPAI_INLINE void storeu(double* p, reg v) { *p = v; }
  static FEDPAI_INLINE reg loadu_f32(const float* p) { return static_cast<double>(*p); }
  static FEDPAI_INLINE void storeu_f32(float* p, reg v) { *p = static_cast<float>(v); }
  static FEDPAI_INLINE reg add(reg a, reg b) { return a + b; }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return a - b; }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return a * b; }
  static FEDPAI_INLINE reg div(reg a, reg b) { return a / b; }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) { return a > 0 ? b : c; }
};

// The sums of a block. lost: what their additions have rounded away; not used unless compensated. Arrays are set apart by
// a line besides, so that an element's places in them do not meet at the same distance from a page.
struct MeanSums {
  alignas(64) double sum[kMeanBlock + 8];
  alignas(64) double lost[kMeanBlock + 8];
};

// Under masks, an element's sum and weight lie side by side: values come scattered, and one access then reaches both.
struct MaskedSums {
  struct Pair {
    double sum, weight;
  };
  alignas(64) Pair at[kMaskedBlock];
  alignas(64) double lost[kMaskedBlock];
};

// sum += term; what that rounds away is added to lost.
template <class V>
FEDPAI_INLINE void two_sum(typename V::reg& sum, const typename V::reg& term, typename V::reg& lost) {
  const typename V::reg total = V::add(sum, term);
  const typename V::reg taken = V::sub(total, sum);
  lost = V::add(lost, V::add(V::sub(sum, V::sub(total, taken)), V::sub(term, taken)));
  sum = total;
}

template <class V, bool Compensated>
FEDPAI_INLINE void add_term(typename V::reg& sum, const typename V::reg& term, typename V::reg& lost) {
  if constexpr (Compensated) {
    two_sum<V>(sum, term, lost);
  } else {
    sum = V::add(sum, term);
  }
}

// (sum + lost) / weight for V::lanes elements.
template <class V, bool Compensated>
FEDPAI_INLINE typename V::reg quotient(const double* sums, const double* lost, const typename V::reg& weight) {
  typename V::reg sum = V::loadu(sums);
  if constexpr (Compensated) sum = V::add(sum, V::loadu(lost));
  return V::div(sum, weight);
}

// ---- mean -------------------------------------------------------------------------------------------------------

// Adds elements [i, i + V::lanes) of each vector, in their order.
template <class V, bool Compensated, int Vectors>
FEDPAI_INLINE void mean_add(const float* const* vectors, const typename V::reg* weights, std::int64_t i, MeanSums& s) {
  typename V::reg sum = V::loadu(s.sum + i), lost = V::zero();
  if constexpr (Compensated) lost = V::loadu(s.lost + i);
FEDPAI_UNROLL
  for (int k = 0; k < Vectors; ++k) {
    add_term<V, Compensated>(sum, V::mul(weights[k], V::loadu_f32(vectors[k] + i)), lost);
  }
  V::storeu(s.sum + i, sum);
  if constexpr (Compensated) V::storeu(s.lost + i, lost);
}

// Adds elements begin to begin + n of each vector.
template <bool Compensated, int Vectors>
FEDPAI_INLINE void mean_sweep(const float* const* vectors, const double* weights, std::int64_t begin, std::int64_t n,
                              MeanSums& s) {
  using V = Vec<double>;
  const float* from[Vectors];
  typename V::reg weight[Vectors];
FEDPAI_UNROLL
  for (int k = 0; k < Vectors; ++k) {
    from[k] = vectors[k] + begin;
    weight[k] = V::set1(weights[k]);
  }
  std::int64_t i = 0;
  for (; i + kLineFloats <= n; i += kLineFloats) {
FEDPAI_UNROLL
    for (int lane = 0; lane < kLineFloats; lane += V::lanes) {
      mean_add<V, Compensated, Vectors>(from, weight, i + lane, s);
    }
  }
  for (; i < n; ++i) mean_add<OneDouble, Compensated, Vectors>(from, weights, i, s);
}

// A block of the mean: elements begin to begin + n of all vectors.
template <bool Compensated>
void mean_block(const float* const* vectors, const double* weights, std::int64_t clients, std::int64_t begin,
                std::int64_t n, MeanSums& s) {
  for (std::int64_t i = 0; i < n; ++i) s.sum[i] = s.lost[i] = 0;
  std::int64_t k = 0;
  for (; k + kVectorsPerSweep <= clients; k += kVectorsPerSweep) {
    mean_sweep<Compensated, kVectorsPerSweep>(vectors + k, weights + k, begin, n, s);
  }
  for (; k + 2 <= clients; k += 2) mean_sweep<Compensated, 2>(vectors + k, weights + k, begin, n, s);
  if (k < clients) mean_sweep<Compensated, 1>(vectors + k, weights + k, begin, n, s);
}

template <bool Compensated>
void mean_form(const float* const* vectors, const double* weights, std::int64_t clients, std::int64_t begin,
               std::int64_t n, float* out) {
  using V = Vec<double>;
  MeanSums s;
  double total = 0;
  for (std::int64_t k = 0; k < clients; ++k) total += weights[k];
  for (const std::int64_t end = begin + n; begin < end; begin += kMeanBlock) {
    const std::int64_t size = end - begin < kMeanBlock ? end - begin : kMeanBlock;
    mean_block<Compensated>(vectors, weights, clients, begin, size, s);
    std::int64_t i = 0;
    for (; i + V::lanes <= size; i += V::lanes) {
      V::storeu_f32(out + begin + i, quotient<V, Compensated>(s.sum + i, s.lost + i, V::set1(total)));
    }
    for (; i < size; ++i) OneDouble::storeu_f32(out + begin + i, quotient<OneDouble, Compensated>(s.sum + i, s.lost + i, total));
  }
}

inline void aggregate_mean(const float* const* vectors, const double* weights, std::int64_t clients,
                           std::int64_t begin, std::int64_t n, bool compensated, float* out) {
  if (compensated) return mean_form<true>(vectors, weights, clients, begin, n, out);
  return mean_form<false>(vectors, weights, clients, begin, n, out);
}

// ---- masked mean ------------------------------------------------------------------------------------------------

// Adds a client's values from number i on, up to the end of the block [begin, end). Returns the number behind the last
// one; -1 where positions are not ascending.
template <bool Compensated>
std::int64_t masked_add(const MaskedVector& vector, std::int64_t i, std::int64_t begin, std::int64_t end,
                        MaskedSums& s) {
  std::int64_t before = begin - 1;
  for (; i < vector.count; ++i) {
    const std::int64_t at = vector.at[i];
    if (at >= end) break;
    if (at <= before) return -1;
    before = at;
    const double term = vector.weight * static_cast<double>(vector.values[i]);
    MaskedSums::Pair& pair = s.at[at - begin];
    add_term<OneDouble, Compensated>(pair.sum, term, s.lost[at - begin]);
    pair.weight += vector.weight;
  }
  return i;
}

// Asks for some `count` values from number i on.
FEDPAI_INLINE void masked_prefetch(const MaskedVector& vector, std::int64_t i, std::int64_t count) {
  for (const std::int64_t end = i + count + kLineFloats; i < end && i < vector.count; i += kLineFloats) {
    __builtin_prefetch(vector.values + i);
    __builtin_prefetch(vector.at + i);
  }
}

// out = (sum + lost) / weight, old where no weight was added, for the block's first n elements.
template <bool Compensated>
void masked_finish(const MaskedSums& s, std::int64_t n, const float* old, float* out) {
  using V = Vec<double>;
  alignas(64) double sum[kFinished], weight[kFinished];
  for (std::int64_t i = 0; i < n; i += kFinished) {
    const std::int64_t count = n - i < kFinished ? n - i : kFinished;
    for (std::int64_t e = 0; e < count; ++e) {
      sum[e] = s.at[i + e].sum;
      weight[e] = s.at[i + e].weight;
    }
    const auto finish = [&](auto vec, std::int64_t e) {
      using W = decltype(vec);
      const typename W::reg w = W::loadu(weight + e);
      const typename W::reg mean = quotient<W, Compensated>(sum + e, s.lost + i + e, w);
      W::storeu_f32(out + i + e, W::where_gt0(w, mean, W::loadu_f32(old + i + e)));
    };
    std::int64_t e = 0;
    for (; e + V::lanes <= count; e += V::lanes) finish(V{}, e);
    for (; e < count; ++e) finish(OneDouble{}, e);
  }
}

template <bool Compensated>
std::int64_t masked_form(const MaskedVector* vectors, std::int64_t clients, const float* old, std::int64_t begin,
                         std::int64_t n, std::int64_t* cursor, float* out) {
  MaskedSums s;
  std::int64_t expected = 0;  // values of a client in a block
  for (const std::int64_t end = begin + n; begin < end; begin += kMaskedBlock) {
    const std::int64_t size = end - begin < kMaskedBlock ? end - begin : kMaskedBlock;
    for (std::int64_t i = 0; i < size; ++i) s.at[i] = {0, 0};
    if constexpr (Compensated) {
      for (std::int64_t i = 0; i < size; ++i) s.lost[i] = 0;
    }
    for (std::int64_t k = 0; k < clients; ++k) {
      const std::int64_t following = (k + kClientsAhead) % clients;
      masked_prefetch(vectors[following], cursor[following], expected);
      const std::int64_t behind = masked_add<Compensated>(vectors[k], cursor[k], begin, begin + size, s);
      if (behind < 0) return k;
      expected = behind - cursor[k];
      cursor[k] = behind;
    }
    masked_finish<Compensated>(s, size, old + begin, out + begin);
  }
  return -1;
}

inline std::int64_t aggregate_masked_mean(const MaskedVector* vectors, std::int64_t clients, const float* old,
                                          std::int64_t begin, std::int64_t n, bool compensated, std::int64_t* cursor,
                                          float* out) {
  if (compensated) return masked_form<true>(vectors, clients, old, begin, n, cursor, out);
  return masked_form<false>(vectors, clients, old, begin, n, cursor, out);
}

// ---- majority ---------------------------------------------------------------------------------------------------

// Votes are counted in bit planes: bit j of plane p is bit p of the number of votes for position j.
struct VotePlanes {
  std::uint64_t plane[64][kVoteBlock];
};

// Adds one bitmap of kVoteBlock words to the first `planes` planes; the carry out of the last one is lost.
FEDPAI_INLINE void vote(VotePlanes& votes, int planes, std::uint64_t* carry) {
  for (int p = 0; p < planes; ++p) {
    std::uint64_t* const plane = votes.plane[p];
    for (std::int64_t w = 0; w < kVoteBlock; ++w) {
      const std::uint64_t both = plane[w] & carry[w];
      plane[w] ^= carry[w];
      carry[w] = both;
    }
  }
}

// words = [votes >= threshold], from the lowest plane to the highest: a higher plane decides unless it is equal.
FEDPAI_INLINE void elected(const VotePlanes& votes, int planes, std::int64_t threshold, std::uint64_t* words) {
  for (std::int64_t w = 0; w < kVoteBlock; ++w) words[w] = ~std::uint64_t{0};
  for (int p = 0; p < planes; ++p) {
    const std::uint64_t* const plane = votes.plane[p];
    const bool wanted = threshold >> p & 1;
    for (std::int64_t w = 0; w < kVoteBlock; ++w) words[w] = wanted ? plane[w] & words[w] : plane[w] | words[w];
  }
}

FEDPAI_INLINE int bits_of(std::int64_t number) {
  int bits = 0;
  for (; number >> bits != 0; ++bits) {
  }
  return bits;
}

inline void aggregate_majority(const std::uint8_t* const* bitmaps, std::int64_t clients, std::int64_t threshold,
                               std::int64_t begin, std::int64_t n, std::uint8_t* out) {
  constexpr std::int64_t block = kVoteBlock * static_cast<std::int64_t>(sizeof(std::uint64_t));
  VotePlanes votes;
  std::uint64_t words[kVoteBlock];
  const int planes = bits_of(clients);
  for (const std::int64_t end = begin + n; begin < end; begin += block) {
    const auto size = static_cast<std::size_t>(end - begin < block ? end - begin : block);
    for (int p = 0; p < planes; ++p) {
      for (std::int64_t w = 0; w < kVoteBlock; ++w) votes.plane[p][w] = 0;
    }
    for (std::int64_t w = 0; w < kVoteBlock; ++w) words[w] = 0;
    for (std::int64_t k = 0; k < clients; ++k) {
      __builtin_memcpy(words, bitmaps[k] + begin, size);
      vote(votes, bits_of(k + 1), words);
    }
    elected(votes, planes, threshold, words);
    __builtin_memcpy(out + begin, words, size);
  }
}

// ---- table ------------------------------------------------------------------------------------------------------

constexpr AggregateKernels make_aggregate_kernels() {
  return {aggregate_mean, aggregate_masked_mean, aggregate_majority, aggregate_step};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
