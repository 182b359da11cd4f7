// SPDX-License-Identifier: Apache-2.0
// Batch norm over one channel's row: what each instruction set provides. The host code (norm.h) cuts the work.
#pragma once

#include <cstdint>

#include "cpu/bf16/kernels.h"
#include "cpu/norm/activation.h"

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

// The maps of all channels, and the activation after them.
template <class T>
struct NormMap {
  const NormAffine<T>* channel;
  Activation activation;
};

// dx = (g - mean_g - (x - mean) * slope) * scale: the gradient through the batch's own mean and variance.
template <class T>
struct NormPull {
  T mean_g;
  T slope;
};

// By the kind of the activation. Backward of the piecewise linear ones, the gradient g before the activation is computed
// from dy and from y = affine(x), which is computed again. `slope`: of the leaky ReLU; other kinds ignore it.
// Pointers need no alignment. Every output is overwritten. dx and g may be dy.
template <class T>
struct NormKernels {
  NormMoments (*moments)(const T* x, std::int64_t n);  // n >= 1, one block
  void (*apply[kActivationKinds])(const T* x, T* y, std::int64_t n, NormAffine<T> affine, T slope);
  // With r added before the activation. y may be r.
  void (*apply_add[kActivationKinds])(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> affine, T slope);
  NormSums (*sums[kPiecewiseKinds])(const T* dy, const T* x, std::int64_t n, NormAffine<T> affine, T slope);  // one block
  // g from the result z of a piecewise linear activation.
  void (*cut[kPiecewiseKinds])(const T* dy, const T* z, T* g, std::int64_t n, T slope);
  void (*dx[kPiecewiseKinds])(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine, T slope,
                              NormPull<T> pull);
  // Fixed statistics: dx = g * scale.
  void (*dx_fixed[kPiecewiseKinds])(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> affine, T slope);
  // g of a smooth activation (null for the others) of affine(x), plus r unless that is null.
  void (*pull[kActivationKinds])(const T* dy, const T* x, const T* r, T* g, std::int64_t n, NormAffine<T> affine);
  // y = x rounded to nearest, or where the activation of affine(y) then has another derivative than that of affine(x),
  // to the other neighbour of x. Floats only, else null.
  void (*round[kPiecewiseKinds])(const T* x, Bf16* y, std::int64_t n, NormAffine<T> affine, T slope);
};

}  // namespace fedpai
