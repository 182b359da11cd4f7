// SPDX-License-Identifier: Apache-2.0
// Batch norm over one channel's row: what each instruction set provides. The host code (norm.h) cuts the work.
#pragma once

#include <cstdint>

namespace fedpai {

// Elements per block. A block's sums run in the element type over this many elements, the blocks of a row are combined
// in double: 1024 floats stay in L1 for the second look at them, and leave 32 additions or fewer in a register lane.
constexpr std::int64_t kNormBlock = 1024;

struct NormMoments {
  double mean;
  double m2;  // sum of (x - mean)^2
};

struct NormSums {
  double g;     // sum of the gradient
  double g_xc;  // sum of gradient * (x - mean)
};

// y = (x - mean) * scale + shift
template <class T>
struct NormAffine {
  T mean;
  T scale;
  T shift;
};

// The maps of all channels, followed by a ReLU or not.
template <class T>
struct NormMap {
  const NormAffine<T>* channel;
  bool relu;
};

// dx = (g - mean_g - (x - mean) * slope) * scale: the gradient through the batch's own mean and variance.
template <class T>
struct NormPull {
  T mean_g;
  T slope;
};

// `_relu`: y = max(y, 0) forward; backward the gradient g is dy where y > 0, else 0, with y computed again from x.
// Pointers need no alignment. Every output is overwritten. dx may be dy.
template <class T>
struct NormKernels {
  NormMoments (*moments)(const T* x, std::int64_t n);  // n >= 1, one block
  void (*apply)(const T* x, T* y, std::int64_t n, NormAffine<T> affine);
  void (*apply_relu)(const T* x, T* y, std::int64_t n, NormAffine<T> affine);
  // With r added before the ReLU. y may be r.
  void (*apply_add)(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> affine);
  void (*apply_add_relu)(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> affine);
  NormSums (*sums)(const T* dy, const T* x, std::int64_t n, NormAffine<T> affine);  // one block
  NormSums (*sums_relu)(const T* dy, const T* x, std::int64_t n, NormAffine<T> affine);
  void (*cut)(const T* dy, const T* z, T* g, std::int64_t n);  // g = dy where z > 0, else 0
  void (*dx)(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine, NormPull<T> pull);
  void (*dx_relu)(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine, NormPull<T> pull);
  // Fixed statistics: dx = g * scale.
  void (*dx_fixed)(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine);
  void (*dx_fixed_relu)(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine);
};

}  // namespace fedpai
