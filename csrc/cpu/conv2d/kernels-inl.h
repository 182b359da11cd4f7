// SPDX-License-Identifier: Apache-2.0
// Sparse convolution on one register tile, one copy per instruction set; panels of rows and the packing around them have files
// of their own.
//
//   forward      dest[c, p] = bias[c] + sum_j value[j] * source[p + offset[j]]       j over the non-zeros of row c
//   weight grad  sums[j]   += sum_p dest[c, p] * source[p + offset[j]]
//
// p runs over the tile's rows x run vectors; the input gradient is the forward formula on the transposed lists.
//
// Why it is fast: each non-zero costs one broadcast, one index load and rows * run FMAs whose other operand folds into
// the FMA's load. With A accumulators that is (A + 2) / A loads per FMA and no stores, so a CPU with two loads and two
// FMAs per cycle runs at A / (A + 2) of its peak while the patch stays in L1. The weight gradient pins the tile of dest
// instead and adds one number per non-zero to its sum: a vector per non-zero would come from L2 or beyond. The lanes of
// four non-zeros are added together, 18 % faster than one by one. Both load a non-zero's offset one round ahead (6 to
// 8 %): every load of a round waits for it, and in the window behind them there is little else to do.
//
// Preconditions, established by run_tiled*.cpp: source aligned to a vector, offsets and rows multiples of the vector,
// kOffsetsAhead offsets readable after those of the last task.
#pragma once

#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/pack_kernels-inl.h"
#include "cpu/conv2d/panel_kernels-inl.h"
#include "cpu/conv2d/stream_backward_kernels-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T, int Rows, int Run>
void accumulate_tile(const TileArgs<T>& a) {
  using V = Vec<T>;
  using reg = typename V::reg;
  static_assert(Rows * Run <= V::accumulators, "the tile must fit the registers, or every FMA spills");

  // Copies: the compiler must assume that vector stores change what `a` points to.
  const std::int64_t dest_row = a.dest_row, tiles = a.tiles;
  const std::int32_t* const offsets = a.offset;

  for (std::int64_t t = 0; t < a.tasks; ++t) {
    const RowTask task = a.task[t];
    T* const dest = a.dest + task.channel * a.dest_channel;
    const T* const values = a.value + (task.value - task.begin);
    const std::int64_t* dest_run = a.dest_run;
    const T* corner = a.source;
    for (std::int64_t i = 0; i < tiles; ++i, dest_run += Run, corner += Run * V::lanes) {
      const T* source[Rows];
      for (int r = 0; r < Rows; ++r) source[r] = corner + r * a.source_row;

      reg sum[Rows][Run];
      if (a.accumulate) {
FEDPAI_UNROLL
        for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
          for (int k = 0; k < Run; ++k) sum[r][k] = V::loadu(dest + r * dest_row + dest_run[k]);
        }
      } else {
        const reg start = a.bias != nullptr ? V::set1(a.bias[task.channel]) : V::zero();
FEDPAI_UNROLL
        for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
          for (int k = 0; k < Run; ++k) sum[r][k] = start;
        }
      }

      std::int64_t next = offsets[task.begin];
      for (std::int64_t j = task.begin; j < task.end; ++j) {
        const reg value = V::set1(values[j]);
        const std::int64_t offset = next;
        next = offsets[j + 1];
FEDPAI_UNROLL
        for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
          for (int k = 0; k < Run; ++k) {
            sum[r][k] = V::fma(value, V::load(source[r] + offset + k * V::lanes), sum[r][k]);
          }
        }
      }

FEDPAI_UNROLL
      for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
        for (int k = 0; k < Run; ++k) V::storeu(dest + r * dest_row + dest_run[k], sum[r][k]);
      }
    }
  }
}

// Fetches a later task's dest. A task outlasts the reorder window, so without it the misses of one task begin only when
// the task before is done: 15 % on 64 channels of 32 x 32 at 23 % density.
template <class T, int Rows, int Run>
FEDPAI_INLINE void prefetch_dest(const T* dest, std::int64_t dest_row, const std::int64_t* dest_run) {
  constexpr int kVectorsPerLine = Vec<T>::lanes * static_cast<int>(sizeof(T)) >= 64 ? 1 : 2;
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; k += kVectorsPerLine) __builtin_prefetch(dest + r * dest_row + dest_run[k]);
  }
}

// The products of a tile with the source pixels of two non-zeros, by lane. Two at once, since one chain of FMAs would
// wait for itself.
template <class T, int Rows, int Run>
FEDPAI_INLINE void two_products(const typename Vec<T>::reg (&grad)[Rows][Run], const T* const (&source)[Rows],
                                std::int64_t first, std::int64_t second, typename Vec<T>::reg& p,
                                typename Vec<T>::reg& q) {
  using V = Vec<T>;
  p = V::zero();
  q = V::zero();
FEDPAI_UNROLL
  for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < Run; ++k) {
      p = V::fma(grad[r][k], V::load(source[r] + first + k * V::lanes), p);
      q = V::fma(grad[r][k], V::load(source[r] + second + k * V::lanes), q);
    }
  }
}

template <class T, int Rows, int Run>
void weight_grad_tile(const GradTileArgs<T>& a) {
  using V = Vec<T>;
  using reg = typename V::reg;
  static_assert(Rows * Run <= V::pinned, "the tile must fit the registers");

  const T* source[Rows];
  for (int r = 0; r < Rows; ++r) source[r] = a.source + r * a.source_row;
  const std::int64_t dest_row = a.dest_row;
  const std::int64_t* const dest_run = a.dest_run;

  for (std::int64_t t = 0; t < a.tasks; ++t) {
    const RowTask task = a.task[t];
    const T* const dest = a.dest + task.channel * a.dest_channel;
    if (t + 1 < a.tasks) {
      prefetch_dest<T, Rows, Run>(a.dest + a.task[t + 1].channel * a.dest_channel, dest_row, dest_run);
    }

    reg grad[Rows][Run];
FEDPAI_UNROLL
    for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
      for (int k = 0; k < Run; ++k) grad[r][k] = V::loadu(dest + r * dest_row + dest_run[k]);
    }
    if (a.bias_sums != nullptr) {
      reg sum = V::load(a.bias_sums + task.channel * V::lanes);
      for (int r = 0; r < Rows; ++r) {
        for (int k = 0; k < Run; ++k) sum = V::add(sum, grad[r][k]);
      }
      V::store(a.bias_sums + task.channel * V::lanes, sum);
    }

    std::int64_t j = task.begin;
    std::int64_t next[4] = {a.offset[j], a.offset[j + 1], a.offset[j + 2], a.offset[j + 3]};
    for (; j + 4 <= task.end; j += 4) {
      reg p, q;
      two_products<T>(grad, source, next[0], next[1], p, q);
      next[0] = a.offset[j + 4];
      next[1] = a.offset[j + 5];
      const reg first = V::fold(p, q);
      two_products<T>(grad, source, next[2], next[3], p, q);
      next[2] = a.offset[j + 6];
      next[3] = a.offset[j + 7];
      V::add_folded(a.sums + j, first, V::fold(p, q));
    }
    for (; j < task.end; ++j) {
      const std::int64_t offset = a.offset[j];
      reg even = V::zero();
      reg odd = V::zero();
FEDPAI_UNROLL
      for (int r = 0; r < Rows; ++r) {
FEDPAI_UNROLL
        for (int k = 0; k < Run; ++k) {
          reg& chain = ((r * Run + k) % 2 == 0) ? even : odd;
          chain = V::fma(grad[r][k], V::load(source[r] + offset + k * V::lanes), chain);
        }
      }
      a.sums[j] += V::reduce_add(V::add(even, odd));
    }
  }
}

template <class T>
void reduce_sums(const T* sums, std::int64_t parts, std::int64_t part_stride, const std::int32_t* order,
                 std::int64_t begin, std::int64_t end, T* grad) {
  using V = Vec<T>;
  for (std::int64_t j = begin; j < end; ++j) {
    typename V::reg total = V::load(sums + j * V::lanes);
    for (std::int64_t p = 1; p < parts; ++p) total = V::add(total, V::load(sums + p * part_stride + j * V::lanes));
    grad[order != nullptr ? order[j] : j] = V::reduce_add(total);
  }
}

// ------------------------------------------------------------------------------------------------------ table

template <class T, int Height, int Rows, int Run>
constexpr void set_panel_tile(Conv2dKernels<T>& table) {
  if constexpr (Height * Rows * Run <= Vec<T>::panel) {
    table.tile[Height - 1][Rows - 1][Run - 1] = accumulate_panel<T, Height, Rows, Run>;
  }
}

template <class T, int Rows, int Run>
constexpr void set_tile(Conv2dKernels<T>& table) {
  if constexpr (Rows * Run <= Vec<T>::accumulators) {
    table.tile[0][Rows - 1][Run - 1] = accumulate_tile<T, Rows, Run>;
  }
  set_panel_tile<T, 2, Rows, Run>(table);
  set_panel_tile<T, 3, Rows, Run>(table);
  set_panel_tile<T, 4, Rows, Run>(table);
  if constexpr (Rows * Run <= Vec<T>::pinned) {
    table.grad_tile[Rows - 1][Run - 1] = weight_grad_tile<T, Rows, Run>;
  }
}

template <class T, int Rows, int Run = kMaxTileRun>
constexpr void set_tiles(Conv2dKernels<T>& table) {
  set_tile<T, Rows, Run>(table);
  if constexpr (Run > 1) set_tiles<T, Rows, Run - 1>(table);
}

template <class T>
constexpr Conv2dKernels<T> make_conv2d_kernels() {
  Conv2dKernels<T> table{};
  table.lanes = Vec<T>::lanes;
  table.accumulators = Vec<T>::accumulators;
  table.pinned = Vec<T>::pinned;
  table.panel = Vec<T>::panel;
  table.grad_panel[0] = weight_grad_panel<T, 1>;
  table.grad_panel[1] = weight_grad_panel<T, 2>;
  table.grad_panel[2] = weight_grad_panel<T, 3>;
  table.grad_panel[3] = weight_grad_panel<T, 4>;
  set_tiles<T, 1>(table);
  set_tiles<T, 2>(table);
  set_tiles<T, 3>(table);
  set_tiles<T, 4>(table);
  table.pack = pack<T>;
  table.unpack = unpack<T>;
  table.reduce = reduce_sums<T>;
  table.stream = make_stream_kernels<T>();
  return table;
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
