// SPDX-License-Identifier: Apache-2.0
// Max and average pooling over batch-last planes, forward and backward.
//
//   max fwd   y[o] = max over taps of x[begin[o] + tap * step], argmax[o] = that tap
//   max dx    dx[i] = sum over windows o that hold i as the tap argmax[o] of dy[o]
//   avg fwd   y[o] = (sum over taps of x) / divisor[o]
//   avg dx    dx[i] = sum over windows o that hold i of dy[o] / divisor[o]
//
// Layout: a plane is [rows][columns][batch], so each pixel is a contiguous run of the batch and vectors run along it.
// The gradients gather (each input pixel asks its windows): dx is written once, never zeroed first, never added to by
// two threads. Sums go in the order of torch's loops. Bound: memory.
//
// The comparisons need masks, which the Vec interface does not name; the compiler's vector types have them on every
// target. They are never passed by value: their calling convention differs between instruction sets.
#pragma once

#include "cpu/pool/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

constexpr int kPoolUnroll = 4;  // vectors of one pixel that share the walk over the taps

template <class T>
struct PoolVec {
  using Tap = typename PoolTap<T>::type;
  static constexpr int lanes = Vec<T>::lanes;
  typedef T reg __attribute__((vector_size(lanes * sizeof(T))));
  typedef Tap mask __attribute__((vector_size(lanes * sizeof(T))));
};

// Reads or writes `count` elements of a register's worth; Whole: all of them, in one move.
template <bool Whole, class R, class E>
FEDPAI_INLINE void pool_load(R& r, const E* p, int count) {
  if constexpr (Whole) {
    __builtin_memcpy(&r, p, sizeof(R));
  } else {
    r = R{};
    for (int i = 0; i < count; ++i) r[i] = p[i];
  }
}
template <bool Whole, class R, class E>
FEDPAI_INLINE void pool_store(E* p, const R& r, int count) {
  if constexpr (Whole) {
    __builtin_memcpy(p, &r, sizeof(R));
  } else {
    for (int i = 0; i < count; ++i) p[i] = r[i];
  }
}

// Walks a pixel's batch: Body::run<U, Whole>(first, count) for U vectors at a time, then one, then the rest. The rest
// of a batch of at least one vector is the last whole vector again: every output is written, never added to.
template <class T, class Body>
FEDPAI_INLINE void pool_walk_batch(std::int64_t batch, const Body& body) {
  constexpr int L = PoolVec<T>::lanes;
  if (batch < L) {
    body.template run<1, false>(0, static_cast<int>(batch));
    return;
  }
  std::int64_t n = 0;
  for (; n + L * kPoolUnroll <= batch; n += L * kPoolUnroll) body.template run<kPoolUnroll, true>(n, L);
  for (; n + L <= batch; n += L) body.template run<1, true>(n, L);
  if (n < batch) body.template run<1, true>(batch - L, L);
}

template <class T>
struct PoolMaxForward {
  const T* x;  // at the window's first tap inside the image
  T* y;
  typename PoolTap<T>::type* argmax;
  std::int64_t row_stride, column_stride;  // elements between taps
  int taps_rows, taps_columns, first_tap, kernel_columns;

  template <int U, bool Whole>
  FEDPAI_INLINE void run(std::int64_t n, int count) const {
    using V = PoolVec<T>;
    typename V::reg best[U];
    typename V::mask at[U];
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) {
      best[u] = typename V::reg{} - static_cast<T>(__builtin_inff());
      at[u] = typename V::mask{} + static_cast<typename V::Tap>(first_tap);
    }
    for (int r = 0; r < taps_rows; ++r) {
      for (int c = 0; c < taps_columns; ++c) {
        const T* p = x + r * row_stride + c * column_stride + n;
        const typename V::mask tap = typename V::mask{} + static_cast<typename V::Tap>(first_tap + r * kernel_columns + c);
        FEDPAI_UNROLL
        for (int u = 0; u < U; ++u) {
          typename V::reg v;
          pool_load<Whole>(v, p + u * V::lanes, count);
          const typename V::mask wins = (v > best[u]) | (v != v);  // a NaN wins, and stays
          best[u] = wins ? v : best[u];
          at[u] = wins ? tap : at[u];
        }
      }
    }
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) {
      pool_store<Whole>(y + n + u * V::lanes, best[u], count);
      pool_store<Whole>(argmax + n + u * V::lanes, at[u], count);
    }
  }
};

template <class T>
void pool_max_fwd(const T* x, T* y_row, typename PoolTap<T>::type* argmax_row, const PoolAxis& rows, const PoolAxis& columns,
                  std::int64_t batch, std::int64_t row) {
  PoolMaxForward<T> body{};
  body.row_stride = rows.step * columns.in * batch;
  body.column_stride = columns.step * batch;
  body.taps_rows = rows.taps[row];
  body.kernel_columns = static_cast<int>(columns.kernel);
  for (std::int64_t o = 0; o < columns.out; ++o) {
    body.x = x + (rows.begin[row] * columns.in + columns.begin[o]) * batch;
    body.y = y_row + o * batch;
    body.argmax = argmax_row + o * batch;
    body.taps_columns = columns.taps[o];
    body.first_tap = rows.first_tap[row] * body.kernel_columns + columns.first_tap[o];
    pool_walk_batch<T>(batch, body);
  }
}

template <class T>
struct PoolMaxGradient {
  const T* dy;
  const typename PoolTap<T>::type* argmax;
  T* dx;
  const PoolAxis& rows;
  const PoolAxis& columns;
  std::int64_t batch, row, column;

  template <int U, bool Whole>
  FEDPAI_INLINE void run(std::int64_t n, int count) const {
    using V = PoolVec<T>;
    typename V::reg sum[U];
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) sum[u] = typename V::reg{};
    for (std::int32_t i = rows.first_entry[row]; i < rows.first_entry[row + 1]; ++i) {
      for (std::int32_t j = columns.first_entry[column]; j < columns.first_entry[column + 1]; ++j) {
        const std::int64_t at = (rows.window[i] * columns.out + columns.window[j]) * batch + n;
        const typename V::mask tap =
            typename V::mask{} + static_cast<typename V::Tap>(rows.tap[i] * columns.kernel + columns.tap[j]);
        FEDPAI_UNROLL
        for (int u = 0; u < U; ++u) {
          typename V::reg g;
          typename V::mask won;
          pool_load<Whole>(g, dy + at + u * V::lanes, count);
          pool_load<Whole>(won, argmax + at + u * V::lanes, count);
          const typename V::mask mine = won == tap;
          sum[u] += mine ? g : typename V::reg{};
        }
      }
    }
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) pool_store<Whole>(dx + n + u * V::lanes, sum[u], count);
  }
};

template <class T>
void pool_max_dx(const T* dy, const typename PoolTap<T>::type* argmax, T* dx_row, const PoolAxis& rows, const PoolAxis& columns,
                 std::int64_t batch, std::int64_t row) {
  for (std::int64_t i = 0; i < columns.in; ++i) {
    pool_walk_batch<T>(batch, PoolMaxGradient<T>{dy, argmax, dx_row + i * batch, rows, columns, batch, row, i});
  }
}

template <class T>
struct PoolAvgForward {
  const T* x;
  T* y;
  std::int64_t row_stride, column_stride;
  int taps_rows, taps_columns;
  T divisor;

  template <int U, bool Whole>
  FEDPAI_INLINE void run(std::int64_t n, int count) const {
    using V = PoolVec<T>;
    typename V::reg sum[U];
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) sum[u] = typename V::reg{};
    for (int r = 0; r < taps_rows; ++r) {
      for (int c = 0; c < taps_columns; ++c) {
        const T* p = x + r * row_stride + c * column_stride + n;
        FEDPAI_UNROLL
        for (int u = 0; u < U; ++u) {
          typename V::reg v;
          pool_load<Whole>(v, p + u * V::lanes, count);
          sum[u] += v;
        }
      }
    }
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) {
      const typename V::reg mean = sum[u] / divisor;
      pool_store<Whole>(y + n + u * V::lanes, mean, count);
    }
  }
};

template <class T>
void pool_avg_fwd(const T* x, T* y_row, const PoolAxis& rows, const PoolAxis& columns, std::int64_t batch,
                  std::int64_t row) {
  PoolAvgForward<T> body{};
  body.row_stride = rows.step * columns.in * batch;
  body.column_stride = columns.step * batch;
  body.taps_rows = rows.taps[row];
  for (std::int64_t o = 0; o < columns.out; ++o) {
    body.x = x + (rows.begin[row] * columns.in + columns.begin[o]) * batch;
    body.y = y_row + o * batch;
    body.taps_columns = columns.taps[o];
    body.divisor = static_cast<T>(static_cast<std::int64_t>(rows.extent[row]) * columns.extent[o]);
    pool_walk_batch<T>(batch, body);
  }
}

template <class T>
struct PoolAvgGradient {
  const T* dy;
  T* dx;
  const PoolAxis& rows;
  const PoolAxis& columns;
  std::int64_t batch, row, column;

  template <int U, bool Whole>
  FEDPAI_INLINE void run(std::int64_t n, int count) const {
    using V = PoolVec<T>;
    typename V::reg sum[U];
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) sum[u] = typename V::reg{};
    for (std::int32_t i = rows.first_entry[row]; i < rows.first_entry[row + 1]; ++i) {
      for (std::int32_t j = columns.first_entry[column]; j < columns.first_entry[column + 1]; ++j) {
        const std::int32_t r = rows.window[i], c = columns.window[j];
        const T* p = dy + (r * columns.out + c) * batch + n;
        const T divisor = static_cast<T>(static_cast<std::int64_t>(rows.extent[r]) * columns.extent[c]);
        FEDPAI_UNROLL
        for (int u = 0; u < U; ++u) {
          typename V::reg g;
          pool_load<Whole>(g, p + u * V::lanes, count);
          sum[u] += g / divisor;
        }
      }
    }
    FEDPAI_UNROLL
    for (int u = 0; u < U; ++u) pool_store<Whole>(dx + n + u * V::lanes, sum[u], count);
  }
};

template <class T>
void pool_avg_dx(const T* dy, T* dx_row, const PoolAxis& rows, const PoolAxis& columns, std::int64_t batch,
                 std::int64_t row) {
  for (std::int64_t i = 0; i < columns.in; ++i) {
    pool_walk_batch<T>(batch, PoolAvgGradient<T>{dy, dx_row + i * batch, rows, columns, batch, row, i});
  }
}

template <class T>
constexpr PoolKernels<T> make_pool_kernels() {
  return {pool_max_fwd<T>, pool_max_dx<T>, pool_avg_fwd<T>, pool_avg_dx<T>};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
