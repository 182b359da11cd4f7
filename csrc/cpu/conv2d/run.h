// SPDX-License-Identifier: Apache-2.0
// The walks that the convolution is made of (schedule.h), for sums and for weight gradients. Preconditions as in
// conv2d.h, which chooses between them.
#pragma once

#include <cstdint>

#include "cpu/conv2d/conv2d.h"
#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/schedule.h"

namespace fedpai {

// dest = bias + sum over the pass's entries of value * source, at the dest pixels of the pass; bias may be null. With a
// norm, the source's pixels are normalised on the way.
template <class T>
void run_tiled(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& source,
              const NormMap<T>* norm, const T* values, const T* bias, const Images<T>& dest, int threads);

// The gradients of values (those in the pass; the others are left alone) and of the bias, which may be null.
template <class T>
void run_tiled_grad(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& x,
                    const NormMap<T>* norm, const Images<const T>& dy, T* values_grad, T* bias_grad, int threads);

// The same by the streamed walk, for all passes of a direction; all images adjacent.
template <class T>
void run_streamed(const std::vector<StreamPass>& passes, const Conv2dKernels<T>& kernels, std::int64_t batch,
                  const Images<const T>& source, const T* values, const T* bias, const Images<T>& dest, int threads);
template <class T>
void run_streamed_grad(const StreamPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch,
                       const Images<const T>& x, const Images<const T>& dy, T* values_grad, T* bias_grad, int threads);

// Both gradients in one walk, that of the input gradient: x lies as dx does. Gradients of values outside the
// passes are left alone. norm: of x, or null; only where normalises_bands.
template <class T>
void run_streamed_backward(const std::vector<StreamPass>& passes, const Conv2dKernels<T>& kernels, std::int64_t batch,
                           const Images<const T>& x, const NormMap<T>* norm, const Images<const T>& dy, const T* values,
                           const Images<T>& dx, T* values_grad, int threads);

// Whether the walk meets each band of x once, so that it may be normalised there and is never stored whole.
bool normalises_bands(const std::vector<StreamPass>& passes, std::int64_t batch);

// bias_grad[c] = the sum of all pixels of a channel; all images adjacent.
template <class T>
void sum_channels(const Conv2dGeometry& geometry, std::int64_t channels, const Conv2dKernels<T>& kernels,
                  const Images<const T>& dy, T* bias_grad, int threads);

// Values in walking order, with zeros where there is none: `values` itself or, gathered, `buffer`.
template <class T>
const T* ordered_values(const IndexVector& order, bool order_is_identity, const T* values, T* buffer,
                        int threads) {
  if (order_is_identity) return values;
  const auto entries = static_cast<std::int64_t>(order.size());
#pragma omp parallel for num_threads(threads) schedule(static) if (entries > 65536)
  for (std::int64_t j = 0; j < entries; ++j) {
    const std::int32_t value = order[static_cast<std::size_t>(j)];
    buffer[j] = value == kNoValue ? T(0) : values[value];
  }
  return buffer;
}

}  // namespace fedpai
