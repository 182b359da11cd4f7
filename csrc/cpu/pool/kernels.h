// SPDX-License-Identifier: Apache-2.0
// Pooling over batch-last planes: what each instruction set provides. The host code (pool.h) cuts the work.
#pragma once

#include <cstdint>

namespace fedpai {

// One direction (rows or columns) of a pooling, as tables. Windows reach only into the image: padding is cut away.
struct PoolAxis {
  std::int64_t in;
  std::int64_t out;
  std::int64_t kernel;
  std::int64_t step;  // between taps: the dilation

  // Window o holds taps first_tap[o] .. first_tap[o] + taps[o] - 1, the first of them over input position begin[o].
  const std::int32_t* begin;
  const std::int32_t* taps;
  const std::int32_t* first_tap;
  const std::int32_t* extent;  // what an average divides by, >= 1

  // Input position i lies in windows window[e], as their tap tap[e], for first_entry[i] <= e < first_entry[i + 1];
  // windows ascend.
  const std::int32_t* first_entry;
  const std::int32_t* window;
  const std::int32_t* tap;
};

// A max is remembered as its tap's number within the window, row * kernel columns + column, in an integer as wide as
// the element: comparing it costs one instruction, widening it from bytes costs more than the bytes save.
template <class T>
struct PoolTap;
template <>
struct PoolTap<float> {
  using type = std::int32_t;
};
template <>
struct PoolTap<double> {
  using type = std::int64_t;
};

// Planes are [rows][columns][batch], contiguous. One call computes one row of the plane it writes, which it overwrites.
template <class T>
struct PoolKernels {
  using Tap = typename PoolTap<T>::type;
  void (*max_fwd)(const T* x, T* y_row, Tap* argmax_row, const PoolAxis& rows, const PoolAxis& columns,
                  std::int64_t batch, std::int64_t row);
  void (*max_dx)(const T* dy, const Tap* argmax, T* dx_row, const PoolAxis& rows, const PoolAxis& columns,
                 std::int64_t batch, std::int64_t row);
  // The divisor of a window is rows.extent * columns.extent.
  void (*avg_fwd)(const T* x, T* y_row, const PoolAxis& rows, const PoolAxis& columns, std::int64_t batch,
                  std::int64_t row);
  void (*avg_dx)(const T* dy, T* dx_row, const PoolAxis& rows, const PoolAxis& columns, std::int64_t batch,
                 std::int64_t row);
};

}  // namespace fedpai
