// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides for changes of layout.
#pragma once

#include <cstdint>

namespace fedpai {

// A part of a matrix and where its transpose goes; strides in elements between rows.
template <class T>
struct TransposeArgs {
  const T* source;
  std::int64_t source_row;
  std::int64_t rows, columns;
  T* dest;  // columns rows of `rows` elements
  std::int64_t dest_row;
};

template <class T>
struct LayoutKernels {
  // At most kTransposeRows rows of at most kTransposeColumns elements.
  void (*transpose)(const TransposeArgs<T>&);
};

// A cache line of dest, and as many lines as leave room in L1.
template <class T>
constexpr std::int64_t kTransposeRows = 64 / static_cast<std::int64_t>(sizeof(T));
constexpr std::int64_t kTransposeColumns = 128;

}  // namespace fedpai
