// SPDX-License-Identifier: Apache-2.0
#include "cpu/layout/layout.h"

#include <algorithm>

#include "cpu/dispatch.h"

namespace fedpai {

template <class T>
void transpose(const T* source, std::int64_t rows, std::int64_t columns, T* dest, int threads) {
  constexpr std::int64_t kParallel = 1 << 16;  // elements from which it pays to wake other threads
  const LayoutKernels<T>& kernels = layout_kernels<T>();
  const std::int64_t down = (rows + kTransposeRows<T> - 1) / kTransposeRows<T>;
  const std::int64_t across = (columns + kTransposeColumns - 1) / kTransposeColumns;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * columns > kParallel)
  for (std::int64_t i = 0; i < down * across; ++i) {
    // Neighbouring strips of rows share pages of the dest.
    const std::int64_t row = i % down * kTransposeRows<T>, column = i / down * kTransposeColumns;
    kernels.transpose({source + row * columns + column, columns, std::min(rows - row, kTransposeRows<T>),
                       std::min(columns - column, kTransposeColumns), dest + column * rows + row, rows});
  }
}

template void transpose<float>(const float*, std::int64_t, std::int64_t, float*, int);
template void transpose<double>(const double*, std::int64_t, std::int64_t, double*, int);

}  // namespace fedpai
