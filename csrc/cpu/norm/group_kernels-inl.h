// SPDX-License-Identifier: Apache-2.0
// Group norm of a strip of images over rows of pixels and channels.
//
//   forward    y = (x - mean) * invstd * weight + bias      mean, invstd of an image's group; weight, bias of a channel
//   backward   dx = (g * weight - mean(g * weight) - (x - mean) * mean(g * weight * (x - mean)) * invstd^2) * invstd
//
// Layout: batch-last activations, C, H, W, N. A group of D channels is D*H*W rows of N images; statistics belong to an
// image, so images are the lanes: a sum is one vector accumulator, never folded over its lanes. A strip is up to eight
// vectors of images, the last one perhaps partial; x, y, dy, dx point to the strip's first row, rows are N apart.
//
// Bytes, in activations: forward 2 reads and 1 write, of which the second read comes from the cache where a strip of a
// group lies in it (the host walks one strip of one group at a time, backwards the second time); backward 4 + 1, of
// which the last two reads likewise. So the memory moves 1 + 1 and 2 + 1.
// Operations: forward 1 + 3 for the statistics, 2 to write y; backward 3 for the sums, 5 to write dx. With 3 loads and
// at most 8 operations to a vector forward, of which a core does two to four a cycle, a vector of 64 bytes takes 4
// cycles or 16 bytes a cycle, and memory gives a core 3 to 4: the bound is memory, whatever the instruction set.
// Measured, 64 channels 32x32, 64 images, 32 groups, two threads: 2.1 ms forward, 2.7 backward, where batch norm takes
// 2.1 and 2.5. With what writing reads first that is 50 and 67 MB, or 24 GB/s: the bound (AMD EPYC Milan, November
// 2026). One group for all channels does not stay in the cache, and takes 2.5 and 3.2.
//
// Precision: as in batch norm (kernels-inl.h): a block's mean is taken first and the squares are then summed about it,
// with the sum of the deviations kept to correct that mean's rounding; blocks are combined by Chan's update in double.
// g * weight is rounded before its mean is taken off, so that a constant gradient vanishes exactly.
#pragma once

#include "cpu/norm/group_kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

constexpr int kGroupPinned = 4;  // vectors side by side whose sums and operands all fit the registers

// W vectors side by side; a partial one comes last.
template <class T, int W, bool Partial>
struct GroupLanes {
  using V = Vec<T>;
  using reg = typename V::reg;
  static constexpr int vectors = W;
  static constexpr int size = W * V::lanes;
  static_assert(size <= kGroupNormWidth, "sums of a strip are kept in arrays of that size");

  int last;  // elements of the partial vector

  explicit GroupLanes(int width) : last(width - (W - 1) * V::lanes) {}

  FEDPAI_INLINE reg load(const T* row, int w) const {
    if constexpr (Partial) {
      if (w == W - 1) return V::load_partial(row + w * V::lanes, last);
    }
    return V::loadu(row + w * V::lanes);
  }
};

// Rows that are walked at once, with sums of their own, to hide the latency of additions.
constexpr int group_unroll(int vectors) { return vectors > kGroupPinned / 2 ? 1 : kGroupPinned / vectors; }

// Calls visit(row, copy) for all rows; rows that follow one another come with different copies of the sums.
template <int Unroll, class F>
FEDPAI_INLINE void group_each_row(std::int64_t rows, const F& visit) {
  std::int64_t row = 0;
  for (; row + Unroll <= rows; row += Unroll) {
    FEDPAI_UNROLL
    for (int copy = 0; copy < Unroll; ++copy) visit(row + copy, copy);
  }
  for (; row < rows; ++row) visit(row, 0);
}

// The sums of all copies, into an array.
template <class T, int W, int Unroll>
FEDPAI_INLINE void group_gather(const typename Vec<T>::reg (&sums)[W][Unroll], T* to) {
  using V = Vec<T>;
  for (int w = 0; w < W; ++w) {
    typename V::reg s = sums[w][0];
    for (int copy = 1; copy < Unroll; ++copy) s = V::add(s, sums[w][copy]);
    V::storeu(to + w * V::lanes, s);
  }
}

// Of `Count` vectors from `First` on, over the rows of a block: sums of x - centre and of its square. All arrays are
// those of the whole strip.
template <int First, int Count, class T, class Lanes>
FEDPAI_INLINE void group_deviations(Lanes lanes, const T* block, std::int64_t rows, std::int64_t stride,
                                    const T* centres, T* off, T* squares) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr int U = group_unroll(Count);
  reg centre[Count], s[Count][U], s2[Count][U];
  for (int w = 0; w < Count; ++w) {
    centre[w] = V::loadu(centres + (First + w) * V::lanes);
    for (int u = 0; u < U; ++u) s[w][u] = s2[w][u] = V::zero();
  }
  group_each_row<U>(rows, [&](std::int64_t row, int u) {
    FEDPAI_UNROLL
    for (int w = 0; w < Count; ++w) {
      const reg d = V::sub(lanes.load(block + row * stride, First + w), centre[w]);
      s[w][u] = V::add(s[w][u], d);
      s2[w][u] = V::fma(d, d, s2[w][u]);
    }
  });
  group_gather<T, Count, U>(s, off + First * V::lanes);
  group_gather<T, Count, U>(s2, squares + First * V::lanes);
}

template <class T, class Lanes>
void group_moments_in(Lanes lanes, const T* x, GroupStrip strip, GroupMoments* result) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr int W = Lanes::vectors, U = group_unroll(W);
  double* const mean = result->mean;
  double* const m2 = result->m2;
  for (int i = 0; i < Lanes::size; ++i) mean[i] = m2[i] = 0.0;
  double count = 0.0;
  for (std::int64_t begin = 0; begin < strip.rows; begin += kGroupNormBlock) {
    const std::int64_t rows = strip.rows - begin < kGroupNormBlock ? strip.rows - begin : kGroupNormBlock;
    const T* const block = x + begin * strip.stride;
    const double n = static_cast<double>(rows);

    reg s[W][U];
    for (int w = 0; w < W; ++w) {
      for (int u = 0; u < U; ++u) s[w][u] = V::zero();
    }
    group_each_row<U>(rows, [&](std::int64_t row, int u) {
      FEDPAI_UNROLL
      for (int w = 0; w < W; ++w) s[w][u] = V::add(s[w][u], lanes.load(block + row * strip.stride, w));
    });
    T centres[Lanes::size], off[Lanes::size], squares[Lanes::size];
    group_gather<T, W, U>(s, centres);
    const T share = static_cast<T>(1.0 / n);
    for (int i = 0; i < Lanes::size; ++i) centres[i] *= share;

    // The second look, from L1, at as many vectors as have their sums in registers.
    if constexpr (W <= kGroupPinned) {
      group_deviations<0, W>(lanes, block, rows, strip.stride, centres, off, squares);
    } else {
      group_deviations<0, kGroupPinned>(lanes, block, rows, strip.stride, centres, off, squares);
      group_deviations<kGroupPinned, W - kGroupPinned>(lanes, block, rows, strip.stride, centres, off, squares);
    }

    // Chan's pairwise update.
    const double total = count + n, weight = n / total, between = count * weight;
    for (int i = 0; i < Lanes::size; ++i) {
      const double sum = static_cast<double>(off[i]), by = sum / n;
      const double block_m2 = static_cast<double>(squares[i]) - sum * by;
      const double delta = static_cast<double>(centres[i]) + by - mean[i];
      mean[i] += delta * weight;
      m2[i] += (block_m2 < 0.0 ? 0.0 : block_m2) + delta * delta * between;
    }
    count = total;
  }
  result->count = count;
}

template <bool Relu, class T, class Lanes>
void group_sums_in(Lanes lanes, const T* dy, const T* x, GroupStrip strip, GroupAffine<T> p, GroupSums* result) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr int W = Lanes::vectors, U = group_unroll(W);
  const reg shift = V::set1(p.bias);
  reg mean[W], scale[W];
  for (int w = 0; w < W; ++w) {
    mean[w] = lanes.load(p.mean, w);
    scale[w] = V::mul(lanes.load(p.invstd, w), V::set1(p.weight));
  }
  for (int i = 0; i < Lanes::size; ++i) result->g[i] = result->g_xc[i] = 0.0;
  for (std::int64_t begin = 0; begin < strip.rows; begin += kGroupNormBlock) {
    const std::int64_t rows = strip.rows - begin < kGroupNormBlock ? strip.rows - begin : kGroupNormBlock;
    reg s[W][U], sx[W][U];
    for (int w = 0; w < W; ++w) {
      for (int u = 0; u < U; ++u) s[w][u] = sx[w][u] = V::zero();
    }
    group_each_row<U>(rows, [&](std::int64_t row, int u) {
      const std::int64_t at = (begin + row) * strip.stride;
      FEDPAI_UNROLL
      for (int w = 0; w < W; ++w) {
        const reg xc = V::sub(lanes.load(x + at, w), mean[w]);
        reg g = lanes.load(dy + at, w);
        if constexpr (Relu) g = V::select_gt0(V::fma(xc, scale[w], shift), g);
        s[w][u] = V::add(s[w][u], g);
        sx[w][u] = V::fma(g, xc, sx[w][u]);
      }
    });
    T g[Lanes::size], g_xc[Lanes::size];
    group_gather<T, W, U>(s, g);
    group_gather<T, W, U>(sx, g_xc);
    for (int i = 0; i < Lanes::size; ++i) {
      result->g[i] += static_cast<double>(g[i]);
      result->g_xc[i] += static_cast<double>(g_xc[i]);
    }
  }
}

// Calls visit(i, load, store) for each vector of a strip's row, from element i on; without sums there is nothing to
// keep in registers, and one loop serves every width.
template <class T, class F>
FEDPAI_INLINE void group_each_vector(int width, const F& visit) {
  using V = Vec<T>;
  using reg = typename V::reg;
  int i = 0;
  for (; i + V::lanes <= width; i += V::lanes) {
    visit(i, [](const T* p) { return V::loadu(p); }, [](T* p, const reg& v) { V::storeu(p, v); });
  }
  const int rest = width - i;
  if (rest == 0) return;
  visit(i, [rest](const T* p) { return V::load_partial(p, rest); },
        [rest](T* p, const reg& v) { V::store_partial(p, v, rest); });
}

// invstd * weight, for each image.
template <class T>
FEDPAI_INLINE void group_scales(int width, GroupAffine<T> p, T* scale) {
  for (int i = 0; i < width; ++i) scale[i] = p.invstd[i] * p.weight;
}

template <class T, bool Relu>
void group_apply(const T* x, T* y, GroupStrip strip, GroupAffine<T> p) {
  using V = Vec<T>;
  using reg = typename V::reg;
  T scale[kGroupNormWidth];
  group_scales(strip.width, p, scale);
  const reg shift = V::set1(p.bias), zero = V::zero();
  for (std::int64_t row = 0; row < strip.rows; ++row) {
    const std::int64_t at = row * strip.stride;
    group_each_vector<T>(strip.width, [&](int i, const auto& load, const auto& store) {
      reg v = V::fma(V::sub(load(x + at + i), load(p.mean + i)), load(scale + i), shift);
      if constexpr (Relu) v = V::max(zero, v);  // in this order NaN stays NaN
      store(y + at + i, v);
    });
  }
}

template <class T, bool Relu>
void group_dx(const T* dy, const T* x, T* dx, GroupStrip strip, GroupAffine<T> p, GroupPull<T> pull) {
  using V = Vec<T>;
  using reg = typename V::reg;
  T scale[kGroupNormWidth];
  group_scales(strip.width, p, scale);
  const reg weight = V::set1(p.weight), shift = V::set1(p.bias);
  for (std::int64_t row = 0; row < strip.rows; ++row) {
    const std::int64_t at = row * strip.stride;
    group_each_vector<T>(strip.width, [&](int i, const auto& load, const auto& store) {
      const reg xc = V::sub(load(x + at + i), load(p.mean + i));
      reg g = load(dy + at + i);
      if constexpr (Relu) g = V::select_gt0(V::fma(xc, load(scale + i), shift), g);
      const reg kept = V::sub(V::mul(g, weight), load(pull.mean_g + i));
      store(dx + at + i, V::mul(V::sub(kept, V::mul(xc, load(pull.slope + i))), load(p.invstd + i)));
    });
  }
}

// Calls run with the lanes of the strip: the number of vectors, and whether the last is partial, are constants there.
template <class T, int W = 1, class F>
FEDPAI_INLINE void group_by_width(int width, const F& run) {
  constexpr int lanes = Vec<T>::lanes;
  if constexpr (W < group_norm_vectors(lanes)) {
    if (width > W * lanes) return group_by_width<T, W + 1>(width, run);
  }
  if (width == W * lanes) {
    run(GroupLanes<T, W, false>(width));
  } else {
    run(GroupLanes<T, W, true>(width));
  }
}

template <class T>
void group_moments(const T* x, GroupStrip strip, GroupMoments* result) {
  group_by_width<T>(strip.width, [&](auto lanes) { group_moments_in(lanes, x, strip, result); });
}

template <class T, bool Relu>
void group_sums(const T* dy, const T* x, GroupStrip strip, GroupAffine<T> p, GroupSums* result) {
  group_by_width<T>(strip.width, [&](auto lanes) { group_sums_in<Relu>(lanes, dy, x, strip, p, result); });
}

template <class T>
constexpr GroupNormKernels<T> make_group_norm_kernels() {
  return {
      Vec<T>::lanes,        group_moments<T>,    group_apply<T, false>, group_apply<T, true>,
      group_sums<T, false>, group_sums<T, true>, group_dx<T, false>,    group_dx<T, true>,
  };
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
