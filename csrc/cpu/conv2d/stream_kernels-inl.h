// SPDX-License-Identifier: Apache-2.0
// The streamed walk over a rectangle of dest positions; one copy per instruction set.
//
//   forward      dest[p] = start + sum_j value[j] * source[p + offset[j]]
//   weight grad  sums[j] += sum_p dest[p] * source[p + offset[j]]
//
// Up to kStreamEntries entries go through a row together, each with a pointer of its own into the source. The forward
// pass keeps their values in registers and stores each dest vector once per so many entries: (E + 1) loads and one store
// per E FMAs. The weight gradient keeps their sums in registers and loads each dest vector once: (E + 1) loads per E FMAs.
// Nothing is packed and the source streams through in long runs, so the cost is that of the cache that holds it: right
// where a source vector meets few entries, when packing it would cost more than the FMAs that follow. Rows of a few vectors
// are no long runs; stream_tile_kernels-inl.h has those.
#pragma once

#include "cpu/conv2d/stream_kernels.h"
#include "cpu/conv2d/stream_tile_kernels-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// Pointers, dest and the loop live in 16 general registers; values (or sums) and two chains in 16 vector registers.
constexpr int kStreamEntries = 8;

// Where a round begins and ends: dest = from + ..., or start + ...; `past` the caches only where from is not dest.
template <class T>
struct StreamRow {
  const T* source;
  const T* from;
  T* dest;
  bool past;
};

template <class T>
FEDPAI_INLINE void store_sum(T* dest, typename Vec<T>::reg sum, bool past) {
  if (past) Vec<T>::store_past(dest, sum);
  else Vec<T>::storeu(dest, sum);
}

// Rounds but the last meet in a buffer where that one goes past the caches: a line is stored there once.
constexpr std::int64_t kPastLine = 64, kPastBufferBytes = 16 * 1024;

template <class T>
FEDPAI_INLINE bool fits_past_caches(const StreamShape& s) {
  const std::int64_t row_bytes = s.run * static_cast<std::int64_t>(sizeof(T));
  return s.pixels == 1 && row_bytes % kPastLine == 0 && row_bytes <= kPastBufferBytes;
}

template <class T>
FEDPAI_INLINE StreamRow<T> row_of_round(const T* source, T* dest, T* buffer, bool past, bool last) {
  return {source, past ? buffer : dest, past && !last ? buffer : dest, past && last};
}

// One row, E entries.
template <class T, int E, bool kFirst>
void stream_row(const StreamArgs<T>& a, const StreamRow<T>& row, std::int64_t first) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr std::int64_t L = V::lanes;
  const T* source[E > 0 ? E : 1];
  reg value[E > 0 ? E : 1];
FEDPAI_UNROLL
  for (int e = 0; e < E; ++e) {
    source[e] = row.source + a.offset[first + e];
    value[e] = V::set1(a.value[first + e]);
  }
  const reg start = V::set1(a.start);
  const std::int64_t run = a.shape.run;
  const std::int64_t source_pixel = a.shape.source_pixel;
  const bool past = row.past;
  for (std::int64_t pixel = 0; pixel < a.shape.pixels; ++pixel) {
    T* const dest = row.dest + pixel * a.shape.dest_pixel;
    const T* const from = row.from + pixel * a.shape.dest_pixel;
    const std::int64_t s = pixel * source_pixel;
    std::int64_t i = 0;
    for (; i + 2 * L <= run; i += 2 * L) {
      reg sum0 = kFirst ? start : V::loadu(from + i);
      reg sum1 = kFirst ? start : V::loadu(from + i + L);
FEDPAI_UNROLL
      for (int e = 0; e < E; ++e) {
        sum0 = V::fma(value[e], V::loadu(source[e] + s + i), sum0);
        sum1 = V::fma(value[e], V::loadu(source[e] + s + i + L), sum1);
      }
      store_sum(dest + i, sum0, past);
      store_sum(dest + i + L, sum1, past);
    }
    if (i + L <= run) {
      reg sum = kFirst ? start : V::loadu(from + i);
FEDPAI_UNROLL
      for (int e = 0; e < E; ++e) sum = V::fma(value[e], V::loadu(source[e] + s + i), sum);
      store_sum(dest + i, sum, past);
      i += L;
    }
    if (i < run) {
      const int left = static_cast<int>(run - i);
      reg sum = kFirst ? start : V::load_partial(from + i, left);
FEDPAI_UNROLL
      for (int e = 0; e < E; ++e) sum = V::fma(value[e], V::load_partial(source[e] + s + i, left), sum);
      V::store_partial(dest + i, sum, left);
    }
  }
}

template <class T, bool kFirst>
void stream_row_of(int entries, const StreamArgs<T>& a, const StreamRow<T>& row, std::int64_t first) {
  switch (entries) {
    case 0: return stream_row<T, 0, kFirst>(a, row, first);
    case 1: return stream_row<T, 1, kFirst>(a, row, first);
    case 2: return stream_row<T, 2, kFirst>(a, row, first);
    case 3: return stream_row<T, 3, kFirst>(a, row, first);
    case 4: return stream_row<T, 4, kFirst>(a, row, first);
    case 5: return stream_row<T, 5, kFirst>(a, row, first);
    case 6: return stream_row<T, 6, kFirst>(a, row, first);
    case 7: return stream_row<T, 7, kFirst>(a, row, first);
    default: return stream_row<T, 8, kFirst>(a, row, first);
  }
}

template <class T>
void stream_accumulate(const StreamArgs<T>& a) {
  if (a.accumulate && a.entries == 0) return;
  if (are_rows_short<T>(a.shape)) return walk_by_tiles<ForwardTiles<T>, T>(a);
  const std::int64_t rounds = a.entries <= kStreamEntries ? 1 : (a.entries + kStreamEntries - 1) / kStreamEntries;
  alignas(kPastLine) T buffer[kPastBufferBytes / sizeof(T)];
  const bool past = a.past_caches && !a.accumulate && fits_past_caches<T>(a.shape);
  for (std::int64_t y = 0; y < a.shape.rows; ++y) {
    T* const dest = a.dest + y * a.shape.dest_row;
    for (std::int64_t round = 0; round < rounds; ++round) {
      const std::int64_t first = a.entries * round / rounds;
      const int count = static_cast<int>(a.entries * (round + 1) / rounds - first);
      const StreamRow<T> row = row_of_round(a.source + y * a.shape.source_row, dest, buffer, past, round + 1 == rounds);
      if (round == 0 && !a.accumulate) stream_row_of<T, true>(count, a, row, first);
      else stream_row_of<T, false>(count, a, row, first);
    }
  }
  if (past) Vec<T>::fence();
}

// ---------------------------------------------------------------------------------------------- weight gradient

// Sums grow by one level of partial sums after so many vectors, which bounds their rounding error.
constexpr std::int64_t kFlushVectors = 256;

template <class T, int E>
void stream_dot(const StreamGradArgs<T>& a, std::int64_t first, std::int64_t row_begin, std::int64_t row_end) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr std::int64_t L = V::lanes;
  // Few entries alone do not hide the FMA's latency.
  constexpr int kChains = E <= 4 ? 2 : 1;
  reg sum[kChains][E];
FEDPAI_UNROLL
  for (int c = 0; c < kChains; ++c) {
FEDPAI_UNROLL
    for (int e = 0; e < E; ++e) sum[c][e] = V::zero();
  }
  const std::int64_t run = a.shape.run;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const T* source[E];
FEDPAI_UNROLL
    for (int e = 0; e < E; ++e) source[e] = a.source + row * a.shape.source_row + a.offset[first + e];
    for (std::int64_t pixel = 0; pixel < a.shape.pixels; ++pixel) {
      const T* const dest = a.dest + row * a.shape.dest_row + pixel * a.shape.dest_pixel;
      const std::int64_t s = pixel * a.shape.source_pixel;
      std::int64_t i = 0;
      for (; i + kChains * L <= run; i += kChains * L) {
FEDPAI_UNROLL
        for (int c = 0; c < kChains; ++c) {
          const reg grad = V::loadu(dest + i + c * L);
FEDPAI_UNROLL
          for (int e = 0; e < E; ++e) sum[c][e] = V::fma(grad, V::loadu(source[e] + s + i + c * L), sum[c][e]);
        }
      }
      for (; i < run; i += L) {
        const int left = static_cast<int>(run - i < L ? run - i : L);
        const reg grad = V::load_partial(dest + i, left);
FEDPAI_UNROLL
        for (int e = 0; e < E; ++e) sum[0][e] = V::fma(grad, V::load_partial(source[e] + s + i, left), sum[0][e]);
      }
    }
  }
FEDPAI_UNROLL
  for (int e = 0; e < E; ++e) {
    T* const total = a.sums + (a.entry != nullptr ? a.entry[first + e] : first + e) * L;
    const reg both = kChains == 2 ? V::add(sum[0][e], sum[kChains - 1][e]) : sum[0][e];
    V::store(total, V::add(V::load(total), both));
  }
}

template <class T>
void stream_dot_of(int entries, const StreamGradArgs<T>& a, std::int64_t first, std::int64_t begin, std::int64_t end) {
  switch (entries) {
    case 1: return stream_dot<T, 1>(a, first, begin, end);
    case 2: return stream_dot<T, 2>(a, first, begin, end);
    case 3: return stream_dot<T, 3>(a, first, begin, end);
    case 4: return stream_dot<T, 4>(a, first, begin, end);
    case 5: return stream_dot<T, 5>(a, first, begin, end);
    case 6: return stream_dot<T, 6>(a, first, begin, end);
    case 7: return stream_dot<T, 7>(a, first, begin, end);
    default: return stream_dot<T, 8>(a, first, begin, end);
  }
}

template <class T>
void stream_bias_sum(const StreamGradArgs<T>& a, std::int64_t row_begin, std::int64_t row_end) {
  using V = Vec<T>;
  constexpr std::int64_t L = V::lanes;
  typename V::reg sum = V::zero();
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t pixel = 0; pixel < a.shape.pixels; ++pixel) {
      const T* const dest = a.dest + row * a.shape.dest_row + pixel * a.shape.dest_pixel;
      std::int64_t i = 0;
      for (; i + L <= a.shape.run; i += L) sum = V::add(sum, V::loadu(dest + i));
      if (i < a.shape.run) sum = V::add(sum, V::load_partial(dest + i, static_cast<int>(a.shape.run - i)));
    }
  }
  V::store(a.bias_sum, V::add(V::load(a.bias_sum), sum));
}

template <class T>
void stream_weight_grad(const StreamGradArgs<T>& a) {
  const std::int64_t vectors_per_row = a.shape.pixels * ((a.shape.run + Vec<T>::lanes - 1) / Vec<T>::lanes);
  const std::int64_t rows = vectors_per_row >= kFlushVectors ? 1 : kFlushVectors / vectors_per_row;
  const std::int64_t rounds = (a.entries + kStreamEntries - 1) / kStreamEntries;
  if (are_rows_short<T>(a.shape)) {
    if (a.bias_sum != nullptr) stream_bias_sum(a, 0, a.shape.rows);
    return walk_by_tiles<GradTiles<T>, T>(a);
  }
  for (std::int64_t begin = 0; begin < a.shape.rows; begin += rows) {
    const std::int64_t end = begin + rows < a.shape.rows ? begin + rows : a.shape.rows;
    if (a.bias_sum != nullptr) stream_bias_sum(a, begin, end);
    for (std::int64_t round = 0; round < rounds; ++round) {
      const std::int64_t first = a.entries * round / rounds;
      stream_dot_of(static_cast<int>(a.entries * (round + 1) / rounds - first), a, first, begin, end);
    }
  }
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
