// SPDX-License-Identifier: Apache-2.0
// Sparse-weight 2-D convolution on the CPU: forward, input gradient, weight gradient at the non-zeros.
//
//   y[n, o, p]  = bias[o] + sum over kept (o, i, t) of  w[o, i, t] * x[n, i, p * stride + t * dilation - pad]
//   dx          = the transpose of that map, applied to dy
//   dw[o, i, t] = sum over n, p of  dy[n, o, p] * x[n, i, p * stride + t * dilation - pad]
//   db[o]       = sum over n, p of  dy[n, o, p]
//
// A linear layer is the case of 1 x 1 images. Outputs are overwritten. Any strides are correct; batch-last images
// (stride 1 between neighbours of the batch) are fast. The same bits on every run with the same number of threads.
// Without images (batch 0) the gradients of values and bias are zero.
#pragma once

#include <cstdint>

#include "cpu/conv2d/schedule_cache.h"
#include "cpu/norm/kernels.h"

namespace fedpai {

// A strided (batch, channel, row, column) tensor; strides in elements, zero allowed where it is only read.
template <class T>
struct Images {
  T* data;
  std::int64_t batch, channel, row, column;
};

// With a norm, x stands for norm(x), which is not stored: it is computed while patches are packed (padding stays zero),
// or, where the walk is streamed, in memory that is gone afterwards. x must be batch-last then, without gaps.
template <class T>
void conv2d_forward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                    const T* values, const T* bias, Images<T> y, int threads);

template <class T>
void conv2d_input_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> dy, const T* values,
                       Images<T> dx, int threads);

// bias_grad may be null. norm: as in the forward pass.
template <class T>
void conv2d_weight_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                        Images<const T> dy, T* values_grad, T* bias_grad, int threads);

// Both gradients. Where they go by one walk (schedule.h), dy is read once for both, and the sums of a weight's gradient have
// another order than alone.
template <class T>
void conv2d_backward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                     Images<const T> dy, const T* values, Images<T> dx, T* values_grad, T* bias_grad, int threads);

}  // namespace fedpai
