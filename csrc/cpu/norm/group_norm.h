// SPDX-License-Identifier: Apache-2.0
// Group norm over batch-last activations: every group of channels is one contiguous run of rows of N images, and an
// image has statistics of its own in each. Cuts the work over threads.
//
// The statistics of a group are combined piece by piece, in order and in double, whichever thread took which piece: the
// result has the same bits at every thread count.
#pragma once

#include <cstdint>

#include "cpu/norm/group_kernels.h"

namespace fedpai {

struct GroupNormShape {
  std::int64_t images;
  std::int64_t channels;
  std::int64_t pixels;  // H*W
  std::int64_t groups;  // divides the channels
};

// x, y: [channels, pixels, images]; weight, bias: [channels] or null (1 and 0). Writes mean and invstd:
// [groups, images] each. Needs at least one element.
template <class T>
void group_norm_forward(GroupNormShape shape, const T* x, const T* weight, const T* bias, double eps, bool relu, T* y,
                        T* mean, T* invstd, int threads);

// dx: as x, or null (not wanted); dweight, dbias: [channels] each, or both null.
template <class T>
void group_norm_backward(GroupNormShape shape, const T* dy, const T* x, const T* weight, const T* bias, const T* mean,
                         const T* invstd, bool relu, T* dx, T* dweight, T* dbias, int threads);

}  // namespace fedpai
