// SPDX-License-Identifier: Apache-2.0
// Sparse convolution on one tile for a panel: dest channels r = 0 .. Height - 1 that keep the same weights; one copy per
// instruction set.
//
//   forward      dest[r, p] = bias[r] + sum_j value[j, r] * source[p + offset[j]]       j over the panel's entries
//   weight grad  sums[j, r] += sum_p dest[r, p] * source[p + offset[j]]
//
// Both are small dense products, in which each loaded vector meets Height others. Forward, a tile of V vectors costs an
// entry V + Height loads for V * Height FMAs: 7 for 12 with four rows and the 16 registers of AVX2, where single rows
// need one load per FMA and run into what the caches deliver. The weight gradient keeps the sums of several entries in
// registers instead, E * Height of them, and walks all pixels of a tile of any size: E + Height loads for E * Height FMAs,
// and the lanes of the sums are added together once per tile.
//
// A tile of three vectors ends in the middle of a cache line. So a task visits a strip of neighbouring tiles before the next
// task: the line that two of them share is then still in the cache, where channels are a power of two apart.
//
// Preconditions as in kernels-inl.h.
#pragma once

#include "cpu/conv2d/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T, int Height, int Rows, int Run>
void accumulate_panel(const TileArgs<T>& a) {
  using V = Vec<T>;
  using reg = typename V::reg;
  static_assert(Height * Rows * Run <= V::panel, "the tiles of a panel must fit the registers");
  constexpr int kVectors = Rows * Run;

  const std::int64_t source_row = a.source_row, dest_row = a.dest_row, tiles = a.tiles;
  const std::int32_t* const offsets = a.offset;

  for (std::int64_t t = 0; t < a.tasks; ++t) {
    const RowTask task = a.task[t];
    const std::int32_t* const channel = a.rows + task.row;
    T* dest[Height];
    for (int h = 0; h < Height; ++h) dest[h] = a.dest + channel[h] * a.dest_channel;
    const std::int64_t* dest_run = a.dest_run;
    const T* source = a.source;
    for (std::int64_t i = 0; i < tiles; ++i, dest_run += Run, source += Run * V::lanes) {
      reg sum[Height][kVectors];
FEDPAI_UNROLL
      for (int h = 0; h < Height; ++h) {
        const reg start = a.bias != nullptr ? V::set1(a.bias[channel[h]]) : V::zero();
FEDPAI_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          sum[h][k] = a.accumulate ? V::loadu(dest[h] + k / Run * dest_row + dest_run[k % Run]) : start;
        }
      }

      const T* value = a.value + task.value;
      std::int64_t next = offsets[task.begin];
      for (std::int64_t j = task.begin; j < task.end; ++j, value += Height) {
        const T* const from = source + next;
        next = offsets[j + 1];
        // The side with fewer vectors stays in registers, the other passes through one.
        if constexpr (kVectors <= Height) {
          reg x[kVectors];
FEDPAI_UNROLL
          for (int k = 0; k < kVectors; ++k) x[k] = V::load(from + k / Run * source_row + k % Run * V::lanes);
FEDPAI_UNROLL
          for (int h = 0; h < Height; ++h) {
            const reg w = V::set1(value[h]);
FEDPAI_UNROLL
            for (int k = 0; k < kVectors; ++k) sum[h][k] = V::fma(w, x[k], sum[h][k]);
          }
        } else {
          reg w[Height];
FEDPAI_UNROLL
          for (int h = 0; h < Height; ++h) w[h] = V::set1(value[h]);
FEDPAI_UNROLL
          for (int k = 0; k < kVectors; ++k) {
            const reg x = V::load(from + k / Run * source_row + k % Run * V::lanes);
FEDPAI_UNROLL
            for (int h = 0; h < Height; ++h) sum[h][k] = V::fma(w[h], x, sum[h][k]);
          }
        }
      }

FEDPAI_UNROLL
      for (int h = 0; h < Height; ++h) {
FEDPAI_UNROLL
        for (int k = 0; k < kVectors; ++k) V::storeu(dest[h] + k / Run * dest_row + dest_run[k % Run], sum[h][k]);
      }
    }
  }
}

// Adds the lanes of one entry's products to its sums, one per row. No more than those may be touched: what follows may be
// another thread's.
template <class T, int Height>
FEDPAI_INLINE void add_products(T* sums, const typename Vec<T>::reg (&product)[Height]) {
  using V = Vec<T>;
  if constexpr (Height == 1) {
    *sums += V::reduce_add(product[0]);
  } else if constexpr (Height == 4) {
    V::add_folded(sums, V::fold(product[0], product[1]), V::fold(product[2], product[3]));
  } else {
    alignas(64) T total[4] = {};
    const typename V::reg last = Height == 3 ? product[Height - 1] : V::zero();
    V::add_folded(total, V::fold(product[0], product[1]), V::fold(last, V::zero()));
    for (int h = 0; h < Height; ++h) sums[h] += total[h];
  }
}

// The products of all pixels of a tile with those that `Entries` entries read, added to these entries' sums.
template <class T, int Height, int Entries>
void panel_products(const GradTileArgs<T>& a, const T* const (&dest)[Height], const std::int32_t* offset, T* sums) {
  using V = Vec<T>;
  using reg = typename V::reg;
  reg product[Entries][Height];
FEDPAI_UNROLL
  for (int e = 0; e < Entries; ++e) {
FEDPAI_UNROLL
    for (int h = 0; h < Height; ++h) product[e][h] = V::zero();
  }
  for (std::int64_t r = 0; r < a.tile_rows; ++r) {
    const T* row[Height];
    const T* source[Entries];
FEDPAI_UNROLL
    for (int h = 0; h < Height; ++h) row[h] = dest[h] + r * a.dest_row;
FEDPAI_UNROLL
    for (int e = 0; e < Entries; ++e) source[e] = a.source + r * a.source_row + offset[e];
    for (std::int64_t k = 0; k < a.tile_run; ++k) {
      const std::int64_t at = a.dest_run[k];
      if constexpr (Entries <= Height) {
        reg x[Entries];
FEDPAI_UNROLL
        for (int e = 0; e < Entries; ++e) x[e] = V::load(source[e] + k * V::lanes);
FEDPAI_UNROLL
        for (int h = 0; h < Height; ++h) {
          const reg g = V::loadu(row[h] + at);
FEDPAI_UNROLL
          for (int e = 0; e < Entries; ++e) product[e][h] = V::fma(g, x[e], product[e][h]);
        }
      } else {
        reg g[Height];
FEDPAI_UNROLL
        for (int h = 0; h < Height; ++h) g[h] = V::loadu(row[h] + at);
FEDPAI_UNROLL
        for (int e = 0; e < Entries; ++e) {
          const reg x = V::load(source[e] + k * V::lanes);
FEDPAI_UNROLL
          for (int h = 0; h < Height; ++h) product[e][h] = V::fma(g[h], x, product[e][h]);
        }
      }
    }
  }
FEDPAI_UNROLL
  for (int e = 0; e < Entries; ++e) add_products<T, Height>(sums + e * Height, product[e]);
}

// The same for `count` entries, fewer than `Entries`.
template <class T, int Height, int Entries>
FEDPAI_INLINE void remaining_products(const GradTileArgs<T>& a, const T* const (&dest)[Height],
                                      const std::int32_t* offset, std::int64_t count, T* sums) {
  if constexpr (Entries > 1) {
    if (count == Entries - 1) panel_products<T, Height, Entries - 1>(a, dest, offset, sums);
    else remaining_products<T, Height, Entries - 1>(a, dest, offset, count, sums);
  }
}

template <class T, int Height>
void weight_grad_panel(const GradTileArgs<T>& a) {
  using V = Vec<T>;
  constexpr int kWidest = 6;  // more entries at a time would save little, and be many more kernels
  constexpr int kEntries = V::panel / Height < kWidest ? V::panel / Height : kWidest;
  for (std::int64_t t = 0; t < a.tasks; ++t) {
    const RowTask task = a.task[t];
    const std::int32_t* const channel = a.rows + task.row;
    const T* dest[Height];
    for (int h = 0; h < Height; ++h) dest[h] = a.dest + channel[h] * a.dest_channel;
    if (a.bias_sums != nullptr) {
      for (int h = 0; h < Height; ++h) {
        typename V::reg sum = V::load(a.bias_sums + channel[h] * V::lanes);
        for (std::int64_t r = 0; r < a.tile_rows; ++r) {
          for (std::int64_t k = 0; k < a.tile_run; ++k) {
            sum = V::add(sum, V::loadu(dest[h] + r * a.dest_row + a.dest_run[k]));
          }
        }
        V::store(a.bias_sums + channel[h] * V::lanes, sum);
      }
    }
    T* sums = a.sums + task.value;
    std::int64_t j = task.begin;
    for (; j + kEntries <= task.end; j += kEntries, sums += kEntries * Height) {
      panel_products<T, Height, kEntries>(a, dest, a.offset + j, sums);
    }
    remaining_products<T, Height, kEntries>(a, dest, a.offset + j, task.end - j, sums);
  }
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
