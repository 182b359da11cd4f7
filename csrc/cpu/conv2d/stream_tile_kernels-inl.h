// SPDX-License-Identifier: Apache-2.0
// The streamed walk where rows of the dest are short: a register tile of them, over which every entry passes; one copy per
// instruction set. The formulas are those of stream_kernels-inl.h, which chooses between the two.
//
// Rows of a few vectors do not repay what a round of eight entries sets up for each of them, a pointer and a broadcast per
// entry: 512 channels 4x4 at 1.5 %, batch 16, take 0.42 ms here and 0.76 there (two threads, AVX-512). Long rows do, and
// there a tile would only break up the runs that the prefetchers follow.
//
// A tile's rows are image rows whose pixels' images join into one run, or, where there are steps between pixels, pixels.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/conv2d/stream_kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// Where the rows of a tile lie, in elements.
struct TileSteps {
  std::int64_t source, dest;
};

template <class T, int Rows, int Run>
void stream_tile(const StreamArgs<T>& a, const T* source, T* dest, TileSteps step) {
  using V = Vec<T>;
  using reg = typename V::reg;
  static_assert(Rows * Run <= V::accumulators, "the tile must fit the registers, or every FMA spills");
  const std::int32_t* const offsets = a.offset;
  const T* const values = a.value;
  const std::int64_t entries = a.entries;

  reg sum[Rows][Run];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) {
      sum[r][k] = a.accumulate ? V::loadu(dest + r * step.dest + k * V::lanes) : V::set1(a.start);
    }
  }
  for (std::int64_t j = 0; j < entries; ++j) {
    const reg value = V::set1(values[j]);
    const T* const from = source + offsets[j];
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
      for (int k = 0; k < Run; ++k) {
        sum[r][k] = V::fma(value, V::loadu(from + r * step.source + k * V::lanes), sum[r][k]);
      }
    }
  }
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) V::storeu(dest + r * step.dest + k * V::lanes, sum[r][k]);
  }
}

// The last vector of some rows, of which `left` lanes are there.
template <class T, int Rows>
void stream_tile_end(const StreamArgs<T>& a, const T* source, T* dest, TileSteps step, int left) {
  using V = Vec<T>;
  typename V::reg sum[Rows];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r] = a.accumulate ? V::load_partial(dest + r * step.dest, left) : V::set1(a.start);
  for (std::int64_t j = 0; j < a.entries; ++j) {
    const typename V::reg value = V::set1(a.value[j]);
    const T* const from = source + a.offset[j];
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) sum[r] = V::fma(value, V::load_partial(from + r * step.source, left), sum[r]);
  }
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) V::store_partial(dest + r * step.dest, sum[r], left);
}

// Args: StreamGradArgs or StreamBackwardArgs.
template <class Args>
FEDPAI_INLINE auto sum_of(const Args& a, std::int64_t j) {
  return a.sums + (a.entry != nullptr ? a.entry[j] : j) * Vec<std::decay_t<decltype(*a.sums)>>::lanes;
}

template <class T, int Rows, int Run>
void stream_grad_tile(const StreamGradArgs<T>& a, const T* source, const T* dest, TileSteps step) {
  using V = Vec<T>;
  using reg = typename V::reg;
  static_assert(Rows * Run <= V::pinned, "the tile must fit the registers");
  reg grad[Rows][Run];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) grad[r][k] = V::loadu(dest + r * step.dest + k * V::lanes);
  }
  for (std::int64_t j = 0; j < a.entries; ++j) {
    const T* const from = source + a.offset[j];
    reg even = V::zero(), odd = V::zero();
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
      for (int k = 0; k < Run; ++k) {
        reg& chain = (r * Run + k) % 2 == 0 ? even : odd;
        chain = V::fma(grad[r][k], V::loadu(from + r * step.source + k * V::lanes), chain);
      }
    }
    T* const sum = sum_of(a, j);
    V::store(sum, V::add(V::load(sum), V::add(even, odd)));
  }
}

template <class T, int Rows>
void stream_grad_tile_end(const StreamGradArgs<T>& a, const T* source, const T* dest, TileSteps step, int left) {
  using V = Vec<T>;
  typename V::reg grad[Rows];
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) grad[r] = V::load_partial(dest + r * step.dest, left);
  for (std::int64_t j = 0; j < a.entries; ++j) {
    const T* const from = source + a.offset[j];
    T* const to = sum_of(a, j);
    typename V::reg sum = V::load(to);
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) sum = V::fma(grad[r], V::load_partial(from + r * step.source, left), sum);
    V::store(to, sum);
  }
}

// ---------------------------------------------------------------------------------------------- which tiles

// Rows of at most so many vectors go by tiles, which have them whole. Measured for 4x4 to 32x32 pixels of 16 to 64 images;
// from 14 vectors on the rows' own walk is as fast or faster, with AVX2 and with AVX-512.
constexpr int kMostShortVectors = 12;
constexpr int kMostTileRows = 4;

template <class T>
struct ForwardTiles {
  using Args = StreamArgs<T>;
  using Dest = T;
  static constexpr int registers = Vec<T>::accumulators;
  template <int Rows, int Run>
  static constexpr auto tile = stream_tile<T, Rows, Run>;
  template <int Rows>
  static constexpr auto end = stream_tile_end<T, Rows>;
};

template <class T>
struct GradTiles {
  using Args = StreamGradArgs<T>;
  using Dest = const T;
  static constexpr int registers = Vec<T>::pinned;
  template <int Rows, int Run>
  static constexpr auto tile = stream_grad_tile<T, Rows, Run>;
  template <int Rows>
  static constexpr auto end = stream_grad_tile_end<T, Rows>;
};

// The kernels of one direction by rows and vectors, each less one, as far as the registers go.
template <class Tiles, class T>
struct TileTable {
  static_assert(Tiles::registers >= kMostShortVectors);
  void (*tile[kMostTileRows][kMostShortVectors])(const typename Tiles::Args&, const T*, typename Tiles::Dest*, TileSteps) = {};
  void (*end[kMostTileRows])(const typename Tiles::Args&, const T*, typename Tiles::Dest*, TileSteps, int) = {};

  constexpr TileTable() { set_rows(std::make_integer_sequence<int, kMostTileRows>{}); }

 private:
  template <int... Rows>
  constexpr void set_rows(std::integer_sequence<int, Rows...>) {
    (set_row<Rows + 1>(std::make_integer_sequence<int, kMostShortVectors>{}), ...);
  }
  template <int Rows, int... Vectors>
  constexpr void set_row(std::integer_sequence<int, Vectors...>) {
    (set_tile<Rows, Vectors + 1>(), ...);
    end[Rows - 1] = Tiles::template end<Rows>;
  }
  template <int Rows, int Run>
  constexpr void set_tile() {
    if constexpr (Rows * Run <= Tiles::registers) tile[Rows - 1][Run - 1] = Tiles::template tile<Rows, Run>;
  }
};

// `count` rows of `run` elements each.
template <class Tiles, class T>
void walk_short_rows(const typename Tiles::Args& a, const T* source, typename Tiles::Dest* dest, TileSteps step,
                     std::int64_t count, std::int64_t run) {
  static constexpr TileTable<Tiles, T> table;
  constexpr int L = Vec<T>::lanes;
  const int vectors = static_cast<int>(run) / L, left = static_cast<int>(run) % L;
  while (count > 0) {
    int rows = count < kMostTileRows ? static_cast<int>(count) : kMostTileRows;
    while (rows * vectors > Tiles::registers) --rows;
    if (vectors > 0) table.tile[rows - 1][vectors - 1](a, source, dest, step);
    if (left > 0) table.end[rows - 1](a, source + vectors * L, dest + vectors * L, step, left);
    source += rows * step.source;
    dest += rows * step.dest;
    count -= rows;
  }
}

template <class T>
bool are_rows_short(const StreamShape& s) {
  return s.pixels * s.run <= kMostShortVectors * Vec<T>::lanes;
}

// The whole rectangle.
template <class Tiles, class T>
void walk_by_tiles(const typename Tiles::Args& a) {
  const StreamShape& s = a.shape;
  if (s.pixels == 1) {
    walk_short_rows<Tiles, T>(a, a.source, a.dest, {s.source_row, s.dest_row}, s.rows, s.run);
    return;
  }
  for (std::int64_t row = 0; row < s.rows; ++row) {
    walk_short_rows<Tiles, T>(a, a.source + row * s.source_row, a.dest + row * s.dest_row,
                              {s.source_pixel, s.dest_pixel}, s.pixels, s.run);
  }
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
