// SPDX-License-Identifier: Apache-2.0
// Group norm over the rows of batch-last activations: what each instruction set provides. The host code (group_norm.h)
// cuts the work.
#pragma once

#include <cstdint>

namespace fedpai {

// Images of the widest strip, and its vectors where they are short. Strips are wide because memory is read best in long
// runs: at 64 images of float, strips of 32 took 1.3 times as long.
constexpr int kGroupNormWidth = 64;
constexpr int kGroupNormVectors = 8;
constexpr int group_norm_vectors(int lanes) {
  return lanes * kGroupNormVectors > kGroupNormWidth ? kGroupNormWidth / lanes : kGroupNormVectors;
}

// Rows in a block. A block's sums run in the element type, the blocks of a piece are combined in double: 64 rows of the
// widest strip stay in L1 for the second look at them.
constexpr std::int64_t kGroupNormBlock = 64;

// Of each image of a strip; elements behind the strip's width hold nothing of meaning.
struct GroupMoments {
  double count;  // the same for all of them
  double mean[kGroupNormWidth];
  double m2[kGroupNormWidth];  // sum of (x - mean)^2
};

struct GroupSums {
  double g[kGroupNormWidth];     // sum of the gradient
  double g_xc[kGroupNormWidth];  // sum of gradient * (x - mean)
};

// `rows` rows of `width` images each, `stride` elements from one to the next. 1 <= width, which is at most
// group_norm_vectors(lanes) vectors.
struct GroupStrip {
  std::int64_t rows;
  std::int64_t stride;
  int width;
};

// y = (x - mean) * (invstd * weight) + bias. mean, invstd: one per image of the strip.
template <class T>
struct GroupAffine {
  const T* mean;
  const T* invstd;
  T weight;
  T bias;
};

// dx = (g * weight - mean_g - (x - mean) * slope) * invstd. mean_g, slope: one per image of the strip.
template <class T>
struct GroupPull {
  const T* mean_g;
  const T* slope;
};

// `_relu`: y = max(y, 0) forward; backward the gradient g is dy where y > 0, else 0, with y computed again from x.
// Pointers need no alignment. Every output is overwritten.
template <class T>
struct GroupNormKernels {
  int lanes;                                                           // of a vector
  void (*moments)(const T* x, GroupStrip strip, GroupMoments* result);  // rows >= 1
  void (*apply)(const T* x, T* y, GroupStrip strip, GroupAffine<T> affine);
  void (*apply_relu)(const T* x, T* y, GroupStrip strip, GroupAffine<T> affine);
  void (*sums)(const T* dy, const T* x, GroupStrip strip, GroupAffine<T> affine, GroupSums* result);
  void (*sums_relu)(const T* dy, const T* x, GroupStrip strip, GroupAffine<T> affine, GroupSums* result);
  void (*dx)(const T* dy, const T* x, T* dx, GroupStrip strip, GroupAffine<T> affine, GroupPull<T> pull);
  void (*dx_relu)(const T* dy, const T* x, T* dx, GroupStrip strip, GroupAffine<T> affine, GroupPull<T> pull);
};

}  // namespace fedpai
