// SPDX-License-Identifier: Apache-2.0
// Transposing a strip of rows: dest[c, r] = source[r, c].
//
// Rows are often a multiple of 4 KiB apart on both sides, so that all lines of a strip fall into one set of the L1 cache.
// Each is therefore touched once: blocks of as many rows as fit a set are transposed in registers into a buffer that
// stays in L1, and the buffer's rows, a cache line each, are stored whole.
#pragma once

#include "cpu/layout/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T>
void transpose_strip(const TransposeArgs<T>& a) {
  using V = Vec<T>;
  constexpr std::int64_t kRows = kTransposeRows<T>;
  alignas(64) T buffer[kTransposeColumns * kRows];
  const std::int64_t full_rows = a.rows - a.rows % V::lanes, full_columns = a.columns - a.columns % V::lanes;
  for (std::int64_t r = 0; r < full_rows; r += V::lanes) {
    for (std::int64_t c = 0; c < full_columns; c += V::lanes) {
      typename V::reg block[V::lanes];
      for (int i = 0; i < V::lanes; ++i) block[i] = V::loadu(a.source + (r + i) * a.source_row + c);
      V::transpose(block);
      for (int i = 0; i < V::lanes; ++i) V::store(buffer + (c + i) * kRows + r, block[i]);
    }
    for (std::int64_t c = full_columns; c < a.columns; ++c) {
      for (int i = 0; i < V::lanes; ++i) buffer[c * kRows + r + i] = a.source[(r + i) * a.source_row + c];
    }
  }
  for (std::int64_t r = full_rows; r < a.rows; ++r) {
    for (std::int64_t c = 0; c < a.columns; ++c) buffer[c * kRows + r] = a.source[r * a.source_row + c];
  }
  for (std::int64_t c = 0; c < a.columns; ++c) {
    const T* const from = buffer + c * kRows;
    T* const to = a.dest + c * a.dest_row;
    for (std::int64_t r = 0; r < full_rows; r += V::lanes) V::storeu(to + r, V::load(from + r));
    for (std::int64_t r = full_rows; r < a.rows; ++r) to[r] = from[r];
  }
}

template <class T>
constexpr LayoutKernels<T> make_layout_kernels() {
  return {transpose_strip<T>};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
