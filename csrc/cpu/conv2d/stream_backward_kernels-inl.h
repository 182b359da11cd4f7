// SPDX-License-Identifier: Apache-2.0
// Both gradients in one streamed walk over a rectangle of positions of x; one copy per instruction set.
//
//   input grad   dest[p] = sum_j value[j] * source[p + offset[j]]      source: dy, dest: dx
//   weight grad  sums[j] += sum_p x[p] * source[p + offset[j]]
//
// What an entry multiplies in the two formulas is the same vector of dy, so it is fetched once and meets two FMAs: the
// walk of the input gradient alone, with x beside dx. The rows' and the tiles' forms are those of stream_kernels-inl.h
// and stream_tile_kernels-inl.h.
#pragma once

#include "cpu/conv2d/stream_kernels-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// Values and sums of a round take two registers an entry, beside x, dx and what was fetched.
template <class T>
constexpr int kBackwardEntries = Vec<T>::accumulators >= 24 ? 8 : 6;

// One row, E entries. Sums are added up over the row first, which bounds their rounding error.
template <class T, int E, bool kFirst>
void backward_row(const StreamBackwardArgs<T>& a, const StreamRow<T>& row, const T* x_row, std::int64_t first) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr std::int64_t L = V::lanes;
  const T* source[E > 0 ? E : 1];
  reg value[E > 0 ? E : 1], total[E > 0 ? E : 1];
FEDPAI_UNROLL
  for (int e = 0; e < E; ++e) {
    source[e] = row.source + a.offset[first + e];
    value[e] = V::set1(a.value[first + e]);
    total[e] = V::zero();
  }
  const std::int64_t run = a.shape.run;
  for (std::int64_t pixel = 0; pixel < a.shape.pixels; ++pixel) {
    T* const dest = row.dest + pixel * a.shape.dest_pixel;
    const T* const from = row.from + pixel * a.shape.dest_pixel;
    const T* const x = x_row + pixel * a.shape.dest_pixel;
    const std::int64_t s = pixel * a.shape.source_pixel;
    std::int64_t i = 0;
    for (; i + L <= run; i += L) {
      const reg input = V::loadu(x + i);
      reg sum = kFirst ? V::zero() : V::loadu(from + i);
FEDPAI_UNROLL
      for (int e = 0; e < E; ++e) {
        const reg grad = V::loadu(source[e] + s + i);
        sum = V::fma(value[e], grad, sum);
        total[e] = V::fma(input, grad, total[e]);
      }
      store_sum(dest + i, sum, row.past);
    }
    if (i < run) {
      const int left = static_cast<int>(run - i);
      const reg input = V::load_partial(x + i, left);
      reg sum = kFirst ? V::zero() : V::load_partial(from + i, left);
FEDPAI_UNROLL
      for (int e = 0; e < E; ++e) {
        const reg grad = V::load_partial(source[e] + s + i, left);
        sum = V::fma(value[e], grad, sum);
        total[e] = V::fma(input, grad, total[e]);
      }
      V::store_partial(dest + i, sum, left);
    }
  }
FEDPAI_UNROLL
  for (int e = 0; e < E; ++e) {
    T* const to = sum_of(a, first + e);
    V::store(to, V::add(V::load(to), total[e]));
  }
}

template <class T, bool kFirst>
void backward_row_of(int entries, const StreamBackwardArgs<T>& a, const StreamRow<T>& row, const T* x, std::int64_t first) {
  switch (entries) {
    case 0: return backward_row<T, 0, kFirst>(a, row, x, first);
    case 1: return backward_row<T, 1, kFirst>(a, row, x, first);
    case 2: return backward_row<T, 2, kFirst>(a, row, x, first);
    case 3: return backward_row<T, 3, kFirst>(a, row, x, first);
    case 4: return backward_row<T, 4, kFirst>(a, row, x, first);
    case 5: return backward_row<T, 5, kFirst>(a, row, x, first);
    case 6: return backward_row<T, 6, kFirst>(a, row, x, first);
    case 7: return backward_row<T, 7, kFirst>(a, row, x, first);
    default: return backward_row<T, 8, kFirst>(a, row, x, first);
  }
}

// ---------------------------------------------------------------------------------------------- short rows

// A tile has its sums in registers, and x too where there are enough of them; else x stays in L1.
template <class T>
constexpr bool kPinsInput = Vec<T>::accumulators >= 24;

template <class T, int Rows, int Run>
void backward_tile(const StreamBackwardArgs<T>& a, const T* source, T* dest, TileSteps step) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const T* const x = a.x + (dest - a.dest);
  const std::int32_t* const offsets = a.offset;
  const T* const values = a.value;
  const std::int64_t entries = a.entries;

  reg sum[Rows][Run], input[Rows][Run];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) {
      sum[r][k] = a.accumulate ? V::loadu(dest + r * step.dest + k * V::lanes) : V::zero();
      if constexpr (kPinsInput<T>) input[r][k] = V::loadu(x + r * step.dest + k * V::lanes);
    }
  }
  for (std::int64_t j = 0; j < entries; ++j) {
    const reg value = V::set1(values[j]);
    const T* const from = source + offsets[j];
    reg even = V::zero(), odd = V::zero();
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
      for (int k = 0; k < Run; ++k) {
        const reg grad = V::loadu(from + r * step.source + k * V::lanes);
        if constexpr (!kPinsInput<T>) input[r][k] = V::loadu(x + r * step.dest + k * V::lanes);
        reg& chain = (r * Run + k) % 2 == 0 ? even : odd;
        sum[r][k] = V::fma(value, grad, sum[r][k]);
        chain = V::fma(input[r][k], grad, chain);
      }
    }
    T* const to = sum_of(a, j);
    V::store(to, V::add(V::load(to), V::add(even, odd)));
  }
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) V::storeu(dest + r * step.dest + k * V::lanes, sum[r][k]);
  }
}

template <class T, int Rows>
void backward_tile_end(const StreamBackwardArgs<T>& a, const T* source, T* dest, TileSteps step, int left) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const T* const x = a.x + (dest - a.dest);
  reg sum[Rows], input[Rows];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
    sum[r] = a.accumulate ? V::load_partial(dest + r * step.dest, left) : V::zero();
    input[r] = V::load_partial(x + r * step.dest, left);
  }
  for (std::int64_t j = 0; j < a.entries; ++j) {
    const reg value = V::set1(a.value[j]);
    const T* const from = source + a.offset[j];
    T* const to = sum_of(a, j);
    reg total = V::load(to);
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const reg grad = V::load_partial(from + r * step.source, left);
      sum[r] = V::fma(value, grad, sum[r]);
      total = V::fma(input[r], grad, total);
    }
    V::store(to, total);
  }
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) V::store_partial(dest + r * step.dest, sum[r], left);
}

template <class T>
struct BackwardTiles {
  using Args = StreamBackwardArgs<T>;
  using Dest = T;
  static constexpr int registers = kMostShortVectors;
  template <int Rows, int Run>
  static constexpr auto tile = backward_tile<T, Rows, Run>;
  template <int Rows>
  static constexpr auto end = backward_tile_end<T, Rows>;
};

template <class T>
void stream_backward(const StreamBackwardArgs<T>& a) {
  if (a.accumulate && a.entries == 0) return;
  if (are_rows_short<T>(a.shape)) return walk_by_tiles<BackwardTiles<T>, T>(a);
  const std::int64_t rounds = a.entries == 0 ? 1 : (a.entries + kBackwardEntries<T> - 1) / kBackwardEntries<T>;
  alignas(kPastLine) T buffer[kPastBufferBytes / sizeof(T)];
  const bool past = a.past_caches && !a.accumulate && fits_past_caches<T>(a.shape);
  for (std::int64_t y = 0; y < a.shape.rows; ++y) {
    T* const dest = a.dest + y * a.shape.dest_row;
    for (std::int64_t round = 0; round < rounds; ++round) {
      const std::int64_t first = a.entries * round / rounds;
      const int count = static_cast<int>(a.entries * (round + 1) / rounds - first);
      const StreamRow<T> row = row_of_round(a.source + y * a.shape.source_row, dest, buffer, past, round + 1 == rounds);
      const T* const x = a.x + y * a.shape.dest_row;
      if (round == 0 && !a.accumulate) backward_row_of<T, true>(count, a, row, x, first);
      else backward_row_of<T, false>(count, a, row, x, first);
    }
  }
  if (past) Vec<T>::fence();
}

template <class T>
constexpr StreamKernels<T> make_stream_kernels() {
  return {stream_accumulate<T>, stream_weight_grad<T>, stream_backward<T>};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
