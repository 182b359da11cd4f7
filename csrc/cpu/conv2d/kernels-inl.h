// SPDX-License-Identifier: Apache-2.0
// Sparse convolution on one register tile, and the packing around it; one copy per instruction set.
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
#include "cpu/conv2d/panel_kernels-inl.h"
#include "cpu/conv2d/stream_kernels-inl.h"
#include "cpu/norm/activation-inl.h"

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

// ---------------------------------------------------------------------------------------------------- packing

template <class T>
FEDPAI_INLINE void zero_pixels(T* packed, std::int64_t vectors) {
  for (std::int64_t i = 0; i < vectors; ++i) Vec<T>::store(packed + i * Vec<T>::lanes, Vec<T>::zero());
}

template <class T, int Blocks>
FEDPAI_INLINE void copy_vectors(T* to, const T* from, int blocks) {
  using V = Vec<T>;
  if constexpr (Blocks > 0) {
FEDPAI_UNROLL
    for (int b = 0; b < Blocks; ++b) V::store(to + b * V::lanes, V::loadu(from + b * V::lanes));
  } else {
    for (int b = 0; b < blocks; ++b) V::store(to + b * V::lanes, V::loadu(from + b * V::lanes));
  }
}

// Copies pixels whose images are adjacent and all present: `blocks` vectors, `Blocks` if that is not 0, to each group.
template <class T, int Blocks>
FEDPAI_INLINE void copy_full(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks,
                             std::int64_t groups, std::int64_t packed_group) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; ++i) {
    T* to = packed;
    const T* from = source;
    for (std::int64_t g = 0; g < groups; ++g) {
      copy_vectors<T, Blocks>(to, from, blocks);
      to += packed_group;
      from += blocks * V::lanes;
    }
    packed += blocks * V::lanes;
    source += step;
  }
}

template <class T>
FEDPAI_INLINE void copy_partial(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks, int valid) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int b = 0; b < blocks; ++b) {
      const int left = valid - b * V::lanes;
      const int n = left < 0 ? 0 : (left > V::lanes ? V::lanes : left);
      V::store(packed + b * V::lanes, n == 0 ? V::zero() : V::load_partial(source + b * V::lanes, n));
    }
    packed += blocks * V::lanes;
    source += step;
  }
}

template <class T>
FEDPAI_INLINE void copy_strided(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks, int valid,
                                std::int64_t lane_step) {
  const int width = blocks * Vec<T>::lanes;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int n = 0; n < valid; ++n) packed[n] = source[n * lane_step];
    for (int n = valid; n < width; ++n) packed[n] = T(0);
    packed += width;
    source += step;
  }
}

// Normalises packed pixels, which lie in L1 from being packed. Lanes from `valid` on stay zero.
template <class T, ActivationKind Kind>
void normalise_packed(T* packed, std::int64_t count, int blocks, int valid, NormAffine<T> p, T slope) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  for (std::int64_t i = 0; i < count; ++i) {
    for (int b = 0; b < blocks; ++b, packed += V::lanes) {
      // Rounded as in norm_apply_rows, so that a result does not depend on where it was normalised.
      const reg v = Activated<T, Kind>::apply(V::fma(V::sub(V::load(packed), mean), scale, shift), leak);
      const int left = valid - b * V::lanes;
      if (left >= V::lanes) V::store(packed, v);
      else if (left > 0) V::store_partial(packed, v, left);
    }
  }
}

// By ActivationKind.
template <class T>
constexpr void (*kNormalisePacked[kActivationKinds])(T*, std::int64_t, int, int, NormAffine<T>, T) = {
    normalise_packed<T, kNone>, normalise_packed<T, kRelu>, normalise_packed<T, kRelu6>,
    normalise_packed<T, kLeakyRelu>, normalise_packed<T, kSilu>, normalise_packed<T, kGelu>,
    normalise_packed<T, kGeluTanh>};

// Rows of a matrix: images of one pixel whose channels are adjacent. A square of as many images and channels as a vector has
// lanes is transposed in registers.
template <class T>
void pack_matrix(const PackArgs<T>& a) {
  using V = Vec<T>;
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * V::lanes;
  T* const packed = a.packed + a.segments->packed;
  for (std::int64_t n = 0; n < a.groups * width; n += V::lanes) {
    T* const to = packed + n / width * a.packed_group + n % width;
    const T* const from = a.source + a.segments->source + n * a.source_lane;
    const std::int64_t left = a.images - n;
    const int valid = static_cast<int>(left < 0 ? 0 : (left < V::lanes ? left : V::lanes));
    std::int64_t c = 0;
    while (c < a.channel_count) {
      const std::int64_t channel = a.channels != nullptr ? a.channels[c] : c, last = c + V::lanes - 1;
      if (valid == V::lanes && last < a.channel_count &&
          (a.channels == nullptr || a.channels[last] - channel == V::lanes - 1)) {
        typename V::reg square[V::lanes];
        for (int i = 0; i < V::lanes; ++i) square[i] = V::loadu(from + i * a.source_lane + channel);
        V::transpose(square);
        for (int i = 0; i < V::lanes; ++i) V::store(to + (c + i) * a.plane, square[i]);
        c += V::lanes;
      } else {
        for (int i = 0; i < V::lanes; ++i) to[c * a.plane + i] = i < valid ? from[i * a.source_lane + channel] : T(0);
        ++c;
      }
    }
  }
}

template <class T>
void pack(const PackArgs<T>& a) {
  if (a.source_lane != 1 && a.source_channel == 1 && a.norm == nullptr && a.segment_count == 1 && a.segments->count == 1 &&
      a.segments->left == 0 && a.segments->right == 0) {
    pack_matrix(a);
    return;
  }
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * Vec<T>::lanes;
  const bool adjacent = a.source_lane == 1;
  const std::int64_t full = adjacent ? a.images / width : 0;  // groups that need no care; one more at most if adjacent
  for (std::int64_t c = 0; c < a.channel_count; ++c) {
    const std::int64_t channel = a.channels != nullptr ? a.channels[c] : c;
    const T* const source_plane = a.source + channel * a.source_channel;
    T* const plane = a.packed + c * a.plane;
    for (std::int64_t s = 0; s < a.segment_count; ++s) {
      const PackSegment& segment = a.segments[s];
      T* const first = plane + segment.packed;
      T* const packed = first + segment.left * width;
      for (int g = 0; g < a.groups; ++g) {
        zero_pixels(first + g * a.packed_group, static_cast<std::int64_t>(segment.left) * a.blocks);
        zero_pixels(packed + segment.count * width + g * a.packed_group,
                    static_cast<std::int64_t>(segment.right) * a.blocks);
      }
      const T* const source = source_plane + segment.source;
      if (a.blocks == 1) {
        copy_full<T, 1>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      } else if (a.blocks == 2) {
        copy_full<T, 2>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      } else {
        copy_full<T, 0>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      }
      for (std::int64_t g = full; g < a.groups; ++g) {
        const std::int64_t left = a.images - g * width;
        const int valid = static_cast<int>(left < width ? left : width);
        T* const to = packed + g * a.packed_group;
        const T* const from = source + g * width * a.source_lane;
        if (adjacent) copy_partial(to, from, segment.count, segment.step, a.blocks, valid);
        else copy_strided(to, from, segment.count, segment.step, a.blocks, valid, a.source_lane);
      }
      if (a.norm == nullptr) continue;
      const auto normalise_row = kNormalisePacked<T>[a.norm->activation.kind];
      const T slope = static_cast<T>(a.norm->activation.slope);
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t left = a.images - g * width;
        const int valid = static_cast<int>(left < width ? left : width);
        normalise_row(packed + g * a.packed_group, segment.count, a.blocks, valid, a.norm->channel[channel],
                      slope);
      }
    }
  }
}

template <class T>
void unpack(const UnpackArgs<T>& a) {
  using V = Vec<T>;
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * V::lanes;
  for (std::int64_t i = 0; i < a.channel_count; ++i) {
    const std::int64_t c = a.channels[i];
    for (std::int64_t y = 0; y < a.rows; ++y) {
      const T* packed = a.packed + c * a.plane + y * a.packed_row;
      T* dest = a.dest + c * a.dest_channel + y * a.dest_row;
      for (std::int64_t x = 0; x < a.columns; ++x, packed += width, dest += a.dest_column) {
        if (a.dest_lane == 1) {
          int left = a.lanes_valid;
          for (int b = 0; left > 0; ++b, left -= V::lanes) {
            V::store_partial(dest + b * V::lanes, V::load(packed + b * V::lanes), left < V::lanes ? left : V::lanes);
          }
        } else {
          for (int n = 0; n < a.lanes_valid; ++n) dest[n * a.dest_lane] = packed[n];
        }
      }
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
