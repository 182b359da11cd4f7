// SPDX-License-Identifier: Apache-2.0
// Pooling over batch-last activations [channels][rows][columns][batch]. Builds the windows' tables, cuts the work.
#pragma once

#include <cstdint>

#include "cpu/pool/kernels.h"

namespace fedpai {

// One direction of a pooling. `out` is the caller's: it decides the rounding (ceil_mode).
struct PoolSpec {
  std::int64_t in;
  std::int64_t out;
  std::int64_t kernel;
  std::int64_t stride;
  std::int64_t padding;
  std::int64_t dilation;
};

struct PoolShape {
  std::int64_t channels;
  std::int64_t batch;
  PoolSpec rows;
  PoolSpec columns;
};

// What an average divides by.
struct PoolDivisor {
  bool count_include_pad;  // positions in the padding count, those beyond it (ceil_mode) do not
  std::int64_t fixed;      // instead of a count; 0: none
};

// argmax: the tap that won, for each element of y.
template <class T>
void max_pool2d_fwd(const PoolShape& shape, const T* x, T* y, typename PoolTap<T>::type* argmax, int threads);
template <class T>
void max_pool2d_dx(const PoolShape& shape, const T* dy, const typename PoolTap<T>::type* argmax, T* dx, int threads);

template <class T>
void avg_pool2d_fwd(const PoolShape& shape, PoolDivisor divisor, const T* x, T* y, int threads);
template <class T>
void avg_pool2d_dx(const PoolShape& shape, PoolDivisor divisor, const T* dy, T* dx, int threads);

// Adaptive: window o reaches from floor(o * in / out) to ceil((o + 1) * in / out); only in and out of the specs count.
template <class T>
void adaptive_avg_pool2d_fwd(const PoolShape& shape, const T* x, T* y, int threads);
template <class T>
void adaptive_avg_pool2d_dx(const PoolShape& shape, const T* dy, T* dx, int threads);

}  // namespace fedpai
