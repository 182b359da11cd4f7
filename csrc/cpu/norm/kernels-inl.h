// SPDX-License-Identifier: Apache-2.0
// Batch norm over one channel's row of n elements.
//
//   forward    y = (x - mean) * scale + shift            scale = weight / sqrt(var + eps), shift = bias
//   backward   dx = (g - mean(g) - (x - mean) * mean(g * (x - mean)) / (var + eps)) * scale
//
// Layout: batch-last activations, so a channel is one contiguous row of H*W*N elements; x, y, dy, dx are such rows.
// Bound: memory. Forward reads x twice (the second time from L2: the host walks a row at once) and writes y once;
// backward reads dy and x twice and writes dx once. Arithmetic is 2 to 4 operations a load and never the limit.
//
// A residual r joins in the same passes: z = relu(y + r), g = dy where z > 0, dr = g. Rows moved, r + w, where torch
// adds, cuts and takes the cut's gradient in passes of its own:
//
//                                           as separate passes                      here
//   forward                                 norm 2+1, add 2+1, ReLU 1+1             x twice, r; z          5+3 -> 3+1
//   backward, residual with a gradient      ReLU 2+1, norm 4+1                      dy, x, z; g | g, x; dx 6+2 -> 5+2
//   backward, residual without              as above                                g lies in dx meanwhile 6+2 -> 5+2
//
// and of the backward reads, the last two are of rows that were touched a moment ago. The first look writes g, so that
// the second needs neither dy nor the mask again, and g is the residual's gradient as it stands. The mask is read from
// z: the next layer keeps z for its own gradient, while r may be needed by nobody else, and recomputing y + r from x
// and r would cost the same read and two operations more.
//
// Precision: a block's mean is taken first and the squares are then summed about it, while the block lies in L1, with
// the sum of the deviations kept to correct for the rounding of that mean. E[x^2] - E[x]^2 would cancel.
// A vector's tail is walked one element at a time: sums of a masked load would need the lanes cleared again.
#pragma once

#include "cpu/norm/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

constexpr int kNormUnroll = 4;  // independent sums: hides the latency of the additions

template <class T>
FEDPAI_INLINE T norm_affine_scalar(T x, NormAffine<T> p) {
  // Through a vector: the same rounding (fused or not) as in the rows' bodies, so a recomputed ReLU agrees.
  using V = Vec<T>;
  T out[V::lanes];
  V::storeu(out, V::fma(V::sub(V::set1(x), V::set1(p.mean)), V::set1(p.scale), V::set1(p.shift)));
  return out[0];
}

template <class T>
NormMoments norm_moments(const T* x, std::int64_t n) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const std::int64_t body = n / (V::lanes * kNormUnroll) * (V::lanes * kNormUnroll);

  reg s[kNormUnroll];
  for (int u = 0; u < kNormUnroll; ++u) s[u] = V::zero();
  for (std::int64_t i = 0; i < body; i += V::lanes * kNormUnroll) {
    for (int u = 0; u < kNormUnroll; ++u) s[u] = V::add(s[u], V::loadu(x + i + u * V::lanes));
  }
  double sum = static_cast<double>(V::reduce_add(V::add(V::add(s[0], s[1]), V::add(s[2], s[3]))));
  for (std::int64_t i = body; i < n; ++i) sum += static_cast<double>(x[i]);
  const T centre = static_cast<T>(sum / static_cast<double>(n));

  reg d1[kNormUnroll], d2[kNormUnroll];
  for (int u = 0; u < kNormUnroll; ++u) d1[u] = d2[u] = V::zero();
  const reg c = V::set1(centre);
  for (std::int64_t i = 0; i < body; i += V::lanes * kNormUnroll) {
    for (int u = 0; u < kNormUnroll; ++u) {
      const reg d = V::sub(V::loadu(x + i + u * V::lanes), c);
      d1[u] = V::add(d1[u], d);
      d2[u] = V::fma(d, d, d2[u]);
    }
  }
  double dev = static_cast<double>(V::reduce_add(V::add(V::add(d1[0], d1[1]), V::add(d1[2], d1[3]))));
  double sq = static_cast<double>(V::reduce_add(V::add(V::add(d2[0], d2[1]), V::add(d2[2], d2[3]))));
  for (std::int64_t i = body; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(centre);
    dev += d;
    sq += d * d;
  }
  const double off = dev / static_cast<double>(n);
  const double m2 = sq - dev * off;
  return {static_cast<double>(centre) + off, m2 < 0.0 ? 0.0 : m2};
}

// r is read with Add only. Rounded as in torch: the norm first, then its sum with r.
template <class T, bool Add, bool Relu>
FEDPAI_INLINE void norm_apply_rows(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> p) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), zero = V::zero();
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    reg v = V::fma(V::sub(V::loadu(x + i), mean), scale, shift);
    if constexpr (Add) v = V::add(v, V::loadu(r + i));
    if constexpr (Relu) v = V::max(zero, v);  // in this order NaN stays NaN
    V::storeu(y + i, v);
  }
  for (; i < n; ++i) {
    T v = norm_affine_scalar(x[i], p);
    if constexpr (Add) v += r[i];
    if constexpr (Relu) v = T(0) > v ? T(0) : v;
    y[i] = v;
  }
}

template <class T, bool Relu>
void norm_apply(const T* x, T* y, std::int64_t n, NormAffine<T> p) {
  norm_apply_rows<T, false, Relu>(x, nullptr, y, n, p);
}

template <class T, bool Relu>
void norm_apply_add(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> p) {
  norm_apply_rows<T, true, Relu>(x, r, y, n, p);
}

// The gradient after the ReLU's mask: dy where (x - mean) * scale + shift > 0.
template <class T, bool Relu>
FEDPAI_INLINE typename Vec<T>::reg norm_masked(const typename Vec<T>::reg& dy, const typename Vec<T>::reg& xc,
                                               const typename Vec<T>::reg& scale,
                                               const typename Vec<T>::reg& shift) {
  using V = Vec<T>;
  if constexpr (Relu) return V::select_gt0(V::fma(xc, scale, shift), dy);
  return dy;
}

template <class T, bool Relu>
FEDPAI_INLINE T norm_masked_scalar(T dy, T x, NormAffine<T> p) {
  if constexpr (Relu) return norm_affine_scalar(x, p) > T(0) ? dy : T(0);
  return dy;
}

template <class T, bool Relu>
NormSums norm_sums(const T* dy, const T* x, std::int64_t n, NormAffine<T> p) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift);
  const std::int64_t body = n / (V::lanes * kNormUnroll) * (V::lanes * kNormUnroll);
  reg s[kNormUnroll], sx[kNormUnroll];
  for (int u = 0; u < kNormUnroll; ++u) s[u] = sx[u] = V::zero();
  for (std::int64_t i = 0; i < body; i += V::lanes * kNormUnroll) {
    for (int u = 0; u < kNormUnroll; ++u) {
      const std::int64_t at = i + u * V::lanes;
      const reg xc = V::sub(V::loadu(x + at), mean);
      const reg g = norm_masked<T, Relu>(V::loadu(dy + at), xc, scale, shift);
      s[u] = V::add(s[u], g);
      sx[u] = V::fma(g, xc, sx[u]);
    }
  }
  NormSums sums{static_cast<double>(V::reduce_add(V::add(V::add(s[0], s[1]), V::add(s[2], s[3])))),
                static_cast<double>(V::reduce_add(V::add(V::add(sx[0], sx[1]), V::add(sx[2], sx[3]))))};
  for (std::int64_t i = body; i < n; ++i) {
    const double g = static_cast<double>(norm_masked_scalar<T, Relu>(dy[i], x[i], p));
    sums.g += g;
    sums.g_xc += g * (static_cast<double>(x[i]) - static_cast<double>(p.mean));
  }
  return sums;
}

template <class T>
void norm_cut(const T* dy, const T* z, T* g, std::int64_t n) {
  using V = Vec<T>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu(g + i, V::select_gt0(V::loadu(z + i), V::loadu(dy + i)));
  for (; i < n; ++i) g[i] = z[i] > T(0) ? dy[i] : T(0);
}

template <class T, bool Relu>
void norm_dx(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> p, NormPull<T> pull) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift);
  const reg mean_g = V::set1(pull.mean_g), minus_slope = V::set1(-pull.slope);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const reg xc = V::sub(V::loadu(x + i), mean);
    const reg g = norm_masked<T, Relu>(V::loadu(dy + i), xc, scale, shift);
    V::storeu(dx + i, V::mul(V::fma(xc, minus_slope, V::sub(g, mean_g)), scale));
  }
  for (; i < n; ++i) {
    const T g = norm_masked_scalar<T, Relu>(dy[i], x[i], p);
    dx[i] = ((g - pull.mean_g) - (x[i] - p.mean) * pull.slope) * p.scale;
  }
}

template <class T, bool Relu>
void norm_dx_fixed(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> p) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    reg g = V::loadu(dy + i);
    if constexpr (Relu) g = norm_masked<T, Relu>(g, V::sub(V::loadu(x + i), mean), scale, shift);
    V::storeu(dx + i, V::mul(g, scale));
  }
  for (; i < n; ++i) {
    T g = dy[i];
    if constexpr (Relu) g = norm_masked_scalar<T, Relu>(g, x[i], p);
    dx[i] = g * p.scale;
  }
}

template <class T>
constexpr NormKernels<T> make_norm_kernels() {
  return {
      norm_moments<T>,          norm_apply<T, false>, norm_apply<T, true>, norm_apply_add<T, false>,
      norm_apply_add<T, true>,  norm_sums<T, false>,  norm_sums<T, true>,  norm_cut<T>,
      norm_dx<T, false>,        norm_dx<T, true>,     norm_dx_fixed<T, false>,
      norm_dx_fixed<T, true>,
  };
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
