// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <omp.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fedpai {

namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();

// Bit k: whether byte k of the 64 at `bytes` is not zero.
std::uint64_t set_among_64(const std::uint8_t* bytes) {
  std::uint64_t bits = 0;
#ifdef __SSE2__
  for (int k = 0; k < 64; k += 16) {
    const __m128i zero = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + k)), _mm_setzero_si128());
    bits |= static_cast<std::uint64_t>(static_cast<std::uint16_t>(~_mm_movemask_epi8(zero))) << k;
  }
#else
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte of a word must be its lowest");
  constexpr std::uint64_t kLow = 0x7f7f7f7f7f7f7f7f, kOnes = 0x0101010101010101, kGather = 0x0102040810204080;
  for (int k = 0; k < 64; k += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + k, 8);
    const std::uint64_t ones = ((((word & kLow) + kLow) | word) >> 7) & kOnes;
    bits |= ((ones * kGather) >> 56) << k;
  }
#endif
  return bits;
}

// Without the instruction of newer CPUs; a call of the compiler's library takes longer.
int count_bits(std::uint64_t bits) {
  constexpr std::uint64_t kPairs = 0x5555555555555555, kFours = 0x3333333333333333, kEights = 0x0f0f0f0f0f0f0f0f;
  bits -= bits >> 1 & kPairs;
  bits = (bits & kFours) + (bits >> 2 & kFours);
  return static_cast<int>(((bits + (bits >> 4)) & kEights) * 0x0101010101010101 >> 56);
}

// Writes where the non-zero bytes of `mask` are, ascending, and returns how many. `positions` has room for kFlattened
// more. How many of 64 bytes are set is unpredictable, so kFlattened positions are always written, and those beyond the
// count written over: cheaper than a branch that is guessed wrong each time.
constexpr int kFlattened = 4;
std::int64_t positions_set(const std::uint8_t* mask, std::int64_t size, std::int32_t* positions) {
  std::int32_t* next = positions;
  std::int64_t i = 0;
  for (; i + 64 <= size; i += 64) {
    std::uint64_t bits = set_among_64(mask + i);
    std::int32_t* const end = next + count_bits(bits);
    do {
      for (int k = 0; k < kFlattened; ++k, bits &= bits - 1) {
        // The bit that stands in for none keeps the count of zeros defined.
        next[k] = static_cast<std::int32_t>(i + __builtin_ctzll(bits | (std::uint64_t{1} << 63)));
      }
      next += kFlattened;
    } while (next < end);
    next = end;
  }
  for (; i < size; ++i) {
    if (mask[i] != 0) *next++ = static_cast<std::int32_t>(i);
  }
  return next - positions;
}

// Counts in bytes as far as they reach, so that the compiler counts a vector at a time.
std::int64_t count_set(const std::uint8_t* mask, std::int64_t size) {
  constexpr std::int64_t kLanes = 16;
  constexpr std::int64_t kStretch = 255 * kLanes;
  std::int64_t total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kStretch) {
    const std::int64_t end = std::min(size, begin + kStretch);
    std::uint8_t counts[kLanes] = {};
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (std::int64_t k = 0; k < kLanes; ++k) counts[k] = static_cast<std::uint8_t>(counts[k] + (mask[i + k] != 0));
    }
    for (; i < end; ++i) total += mask[i] != 0;
    for (const std::uint8_t count : counts) total += count;
  }
  return total;
}

// Divides numbers below `limit` by `divisor`: a multiplication where that is exact, as it is for all but huge layers,
// since a division takes most of the time that an entry costs.
class Divider {
 public:
  Divider(std::int64_t limit, std::uint32_t divisor)
      : divisor_(divisor),
        // The error is below divisor / 2^32 per unit of the dividend, and must not add up to 1 / divisor.
        inverse_(limit * divisor < (std::int64_t{1} << 32) ? (std::uint64_t{1} << 32) / divisor + 1 : 0) {}

  std::uint32_t operator()(std::uint32_t dividend) const {
    if (inverse_ == 0) return dividend / divisor_;
    return static_cast<std::uint32_t>((dividend * inverse_) >> 32);
  }

 private:
  std::uint32_t divisor_;
  std::uint64_t inverse_;
};

// Below so many weights a second thread costs more than it does.
constexpr std::int64_t kParallelWeights = std::int64_t{1} << 18;

// Empty when no weight survives, or more than 2^31 - 1 do; `nnz` says which.
EntryList list_by_output(const std::uint8_t* mask, const WeightShape& shape, std::int64_t& nnz) {
  const std::int64_t row_numel = shape.in_channels_per_group * shape.taps();
  const std::int64_t rows = shape.out_channels;
  std::vector<std::int64_t> counts(static_cast<std::size_t>(rows));
#pragma omp parallel for schedule(static) if (shape.numel() > kParallelWeights)
  for (std::int64_t row = 0; row < rows; ++row) {
    counts[static_cast<std::size_t>(row)] = count_set(mask + row * row_numel, row_numel);
  }
  nnz = 0;
  for (const std::int64_t count : counts) nnz += count;
  if (nnz == 0 || nnz > kLargest) return {};

  EntryList list;
  list.columns = shape.in_channels();
  list.row_begin.push_back(0);
  for (const std::int64_t count : counts) list.row_begin.push_back(list.row_begin.back() + static_cast<std::int32_t>(count));
  list.column.resize(static_cast<std::size_t>(nnz));
  list.tap.resize(list.column.size());
  list.value.resize(list.column.size());
  const std::int64_t rows_per_group = rows / shape.groups;
  const auto taps = static_cast<std::uint32_t>(shape.taps());
  const Divider by_taps(row_numel, taps);
  IndexVector positions(static_cast<std::size_t>(*std::max_element(counts.begin(), counts.end()) + kFlattened));
#pragma omp parallel for schedule(static) firstprivate(positions) if (shape.numel() > kParallelWeights)
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto first_column = static_cast<std::int32_t>(row / rows_per_group * shape.in_channels_per_group);
    const auto begin = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row)]);
    const std::int64_t count = positions_set(mask + row * row_numel, row_numel, positions.data());
    std::int32_t* const column = list.column.data() + begin;
    std::int32_t* const tap = list.tap.data() + begin;
    for (std::int64_t j = 0; j < count; ++j) {
      const auto position = static_cast<std::uint32_t>(positions[static_cast<std::size_t>(j)]);
      const std::uint32_t channel = by_taps(position);
      column[j] = first_column + static_cast<std::int32_t>(channel);
      tap[j] = static_cast<std::int32_t>(position - channel * taps);
    }
    std::iota(list.value.begin() + begin, list.value.begin() + begin + count, static_cast<std::int32_t>(begin));
  }
  return list;
}

// A counting sort by column; stable, so that inside a column the rows stay ascending. Several threads share it by
// ranges of columns: each reads the whole list and writes its own part.
EntryList transpose(const EntryList& list, std::int64_t weights) {
  const std::size_t size = list.column.size();
  EntryList result;
  result.columns = list.rows();
  result.row_begin.assign(static_cast<std::size_t>(list.columns) + 1, 0);
  result.column.resize(size);
  result.tap.resize(size);
  result.value.resize(size);
  for (const std::int32_t column : list.column) ++result.row_begin[static_cast<std::size_t>(column) + 1];
  for (std::size_t c = 1; c < result.row_begin.size(); ++c) result.row_begin[c] += result.row_begin[c - 1];
  std::vector<std::int32_t> next(result.row_begin.begin(), result.row_begin.end() - 1);
#pragma omp parallel if (weights > kParallelWeights && list.columns > 1)
  {
    const std::int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const auto first = static_cast<std::int32_t>(list.columns * me / team);
    const auto last = static_cast<std::int32_t>(list.columns * (me + 1) / team);
    for (std::int64_t row = 0; row < list.rows(); ++row) {
      const auto end = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row) + 1]);
      for (auto from = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row)]); from < end; ++from) {
        const std::int32_t column = list.column[from];
        if (column < first) continue;
        if (column >= last) break;  // a row's columns ascend
        const auto to = static_cast<std::size_t>(next[static_cast<std::size_t>(column)]++);
        result.column[to] = static_cast<std::int32_t>(row);
        result.tap[to] = list.tap[from];
        result.value[to] = list.value[from];
      }
    }
  }
  return result;
}

}  // namespace

Plan::Plan(const std::uint8_t* mask, const WeightShape& shape) : shape_(shape) {
  if (shape.out_channels <= 0 || shape.in_channels_per_group <= 0 || shape.kernel_h <= 0 || shape.kernel_w <= 0 ||
      shape.groups <= 0) {
    throw std::invalid_argument("mask: every dimension must be positive");
  }
  if (shape.out_channels % shape.groups != 0) {
    throw std::invalid_argument("groups: " + std::to_string(shape.groups) + " does not divide the mask's " +
                                std::to_string(shape.out_channels) + " output channels");
  }
  if (shape.taps() > kLargest || shape.in_channels() > kLargest || shape.in_channels() * shape.taps() > kLargest ||
      shape.out_channels > kLargest) {
    throw std::invalid_argument("mask: at most 2^31 - 1 output channels, and inputs per output, are supported");
  }
  std::int64_t nnz = 0;
  by_output_ = list_by_output(mask, shape, nnz);
  if (nnz == 0) throw std::invalid_argument("mask: no weight survives; a layer needs at least one");
  if (nnz > kLargest) {
    throw std::invalid_argument("mask: " + std::to_string(nnz) + " surviving weights, at most 2^31 - 1 are supported");
  }
  by_input_ = transpose(by_output_, shape.numel());
  by_output_.groups = find_row_groups(by_output_);
  by_input_.groups = find_row_groups(by_input_);
}

void Plan::flat_indices(std::int64_t* out) const {
  const std::int64_t row_numel = shape_.in_channels_per_group * shape_.taps();
  const std::int64_t rows_per_group = shape_.out_channels / shape_.groups;
  std::size_t j = 0;
  for (std::int64_t row = 0; row < shape_.out_channels; ++row) {
    const std::int64_t first_column = row / rows_per_group * shape_.in_channels_per_group;
    for (; j < static_cast<std::size_t>(by_output_.row_begin[static_cast<std::size_t>(row) + 1]); ++j) {
      out[j] = row * row_numel + (by_output_.column[j] - first_column) * shape_.taps() + by_output_.tap[j];
    }
  }
}

}  // namespace fedpai
