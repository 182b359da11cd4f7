// SPDX-License-Identifier: Apache-2.0
// Batch norm over batch-last activations: every channel is one contiguous row. Cuts the work over threads.
//
// The statistics of a row are combined block by block, in order and in double, whichever thread took which block:
// the result has the same bits at every thread count.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bf16/kernels.h"
#include "cpu/norm/kernels.h"

namespace fedpai {

struct NormShape {
  std::int64_t channels;
  std::int64_t row;  // elements per channel, H*W*N
};

// The map of each channel whose statistics are known; weight and bias may be null (1 and 0).
template <class T>
std::vector<NormAffine<T>> norm_affines(std::int64_t channels, const T* weight, const T* bias, const T* mean,
                                        const T* invstd);

// y = activation(map(x)); both [channels, row].
template <class T>
void normalise(NormShape shape, const T* x, NormMap<T> map, T* y, int threads);

// x, y: [channels, row]; r, a residual added before the activation, likewise or null. weight, bias: [channels] or null
// (1 and 0). Writes mean, invstd and var (unbiased, what the running variance takes in): [channels] each. Needs
// row >= 1. Without y (null, as is r then), only the statistics.
template <class T>
void batch_norm_train(NormShape shape, const T* x, const T* r, const T* weight, const T* bias, double eps,
                      Activation activation, T* y, T* mean, T* invstd, T* var, int threads);

// As above with given statistics; writes invstd, without y nothing else.
template <class T>
void batch_norm_eval(NormShape shape, const T* x, const T* r, const T* weight, const T* bias, const T* mean,
                     const T* var, double eps, Activation activation, T* y, T* invstd, int threads);

// [channels, row] elements as they were kept for the backward pass: of T, or floats rounded to bfloat16. Null: absent.
template <class T>
struct NormKept {
  const T* exact = nullptr;
  const Bf16* rounded = nullptr;

  bool absent() const { return exact == nullptr && rounded == nullptr; }
};

// dx: [channels, row] or null (not wanted); dweight, dbias: [channels] each, or both null. `through_statistics` tells
// whether mean and invstd came from x itself (batch_norm_train) or were given. z: [channels, row], needed
// where the forward pass had a residual and an activation, else null: its result, but the residual itself where the
// activation is smooth. dr: [channels, row], the residual's gradient, or null (not wanted); given with z only, for
// without an activation it is dy itself.
template <class T>
void batch_norm_backward(NormShape shape, const T* dy, NormKept<T> x, NormKept<T> z, const T* weight, const T* bias,
                         const T* mean, const T* invstd, bool through_statistics, Activation activation, T* dx, T* dr,
                         T* dweight, T* dbias, int threads);

// y = x, [channels, row], rounded to bfloat16 for batch_norm_backward without a residual: to nearest, except where the
// piecewise linear activation of the rounded x would then have another derivative than that of x. There y is the other
// neighbour of x. With mean null (as are invstd, weight and bias then), x is the result z of such an activation.
void round_for_backward(NormShape shape, const float* x, const float* weight, const float* bias, const float* mean,
                        const float* invstd, Activation activation, Bf16* y, int threads);

}  // namespace fedpai
