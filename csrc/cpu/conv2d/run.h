// SPDX-License-Identifier: Apache-2.0
// The two walks that the convolution is made of. Preconditions as in conv2d.h, which chooses the passes.
#pragma once

#include <cstdint>

#include "cpu/conv2d/conv2d.h"
#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/schedule.h"

namespace fedpai {

// dest = bias + sum over the pass's entries of value * source, at the dest pixels of the pass; bias may be null.
template <class T>
void run_pass(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& source,
              const T* values, const T* bias, const Images<T>& dest, int threads);

// The gradients of values (those in the pass; the others are left alone) and of the bias, which may be null.
template <class T>
void run_weight_grad(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& x,
                     const Images<const T>& dy, T* values_grad, T* bias_grad, int threads);

}  // namespace fedpai
