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
// Other activations stand in the ReLU's place. Those that are piecewise linear take its ways: the gradient from x, or
// with a residual from z. The smooth ones (SiLU, GELU) cannot be read from their result, and cost an exponential: the
// first look writes g, computed from x and r, and the second finds it there. r is kept then in place of z.
//
// Precision: a block's mean is taken first and the squares are then summed about it, while the block lies in L1, with
// the sum of the deviations kept to correct for the rounding of that mean. E[x^2] - E[x]^2 would cancel.
// Where sums are taken a vector's tail is walked one element at a time: sums of a masked load would need the lanes cleared again.
#pragma once

#include "cpu/bf16/kernels-inl.h"
#include "cpu/norm/activation-inl.h"
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

  // Meanwhile the next block is fetched: blocks are pages, in each of which the core's own prefetcher starts anew.
  constexpr int kVectorsPerLine = V::lanes * sizeof(T) < 64 ? static_cast<int>(64 / (V::lanes * sizeof(T))) : 1;
  reg d1[kNormUnroll], d2[kNormUnroll];
  for (int u = 0; u < kNormUnroll; ++u) d1[u] = d2[u] = V::zero();
  const reg c = V::set1(centre);
  for (std::int64_t i = 0; i < body; i += V::lanes * kNormUnroll) {
    for (int u = 0; u < kNormUnroll; u += kVectorsPerLine) __builtin_prefetch(x + n + i + u * V::lanes);  // the next block
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

// The norm of the elements at p, of which the first `left` count.
template <class T>
FEDPAI_INLINE typename Vec<T>::reg norm_partial(const T* p, int left, NormAffine<T> a) {
  using V = Vec<T>;
  return V::fma(V::sub(V::load_partial(p, left), V::set1(a.mean)), V::set1(a.scale), V::set1(a.shift));
}

// r is read with Add only. Rounded as in torch: the norm first, then its sum with r.
template <class T, bool Add, ActivationKind Kind>
FEDPAI_INLINE void norm_apply_rows(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> p, T slope) {
  using V = Vec<T>;
  using A = Activated<T, Kind>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    reg v = V::fma(V::sub(V::loadu(x + i), mean), scale, shift);
    if constexpr (Add) v = V::add(v, V::loadu(r + i));
    V::storeu(y + i, A::apply(v, leak));
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  reg v = norm_partial(x + i, left, p);
  if constexpr (Add) v = V::add(v, V::load_partial(r + i, left));
  V::store_partial(y + i, A::apply(v, leak), left);
}

template <class T, ActivationKind Kind>
void norm_apply(const T* x, T* y, std::int64_t n, NormAffine<T> p, T slope) {
  norm_apply_rows<T, false, Kind>(x, nullptr, y, n, p, slope);
}

template <class T, ActivationKind Kind>
void norm_apply_add(const T* x, const T* r, T* y, std::int64_t n, NormAffine<T> p, T slope) {
  norm_apply_rows<T, true, Kind>(x, r, y, n, p, slope);
}

// The gradient before the activation, which is computed again from x - mean.
template <class T, ActivationKind Kind>
FEDPAI_INLINE typename Vec<T>::reg norm_pulled(const typename Vec<T>::reg& dy, const typename Vec<T>::reg& xc,
                                               const typename Vec<T>::reg& scale, const typename Vec<T>::reg& shift,
                                               const typename Vec<T>::reg& leak) {
  if constexpr (Kind == kNone) return dy;
  return Activated<T, Kind>::pull(Vec<T>::fma(xc, scale, shift), dy, leak);
}

template <class T, ActivationKind Kind>
FEDPAI_INLINE T norm_pulled_scalar(T dy, T x, NormAffine<T> p, T slope) {
  if constexpr (Kind == kNone) return dy;
  using V = Vec<T>;
  T out[V::lanes];
  V::storeu(out, Activated<T, Kind>::pull(V::set1(norm_affine_scalar(x, p)), V::set1(dy), V::set1(slope)));
  return out[0];
}

template <class T, ActivationKind Kind>
NormSums norm_sums(const T* dy, const T* x, std::int64_t n, NormAffine<T> p, T slope) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  const std::int64_t body = n / (V::lanes * kNormUnroll) * (V::lanes * kNormUnroll);
  reg s[kNormUnroll], sx[kNormUnroll];
  for (int u = 0; u < kNormUnroll; ++u) s[u] = sx[u] = V::zero();
  for (std::int64_t i = 0; i < body; i += V::lanes * kNormUnroll) {
    for (int u = 0; u < kNormUnroll; ++u) {
      const std::int64_t at = i + u * V::lanes;
      const reg xc = V::sub(V::loadu(x + at), mean);
      const reg g = norm_pulled<T, Kind>(V::loadu(dy + at), xc, scale, shift, leak);
      s[u] = V::add(s[u], g);
      sx[u] = V::fma(g, xc, sx[u]);
    }
  }
  NormSums sums{static_cast<double>(V::reduce_add(V::add(V::add(s[0], s[1]), V::add(s[2], s[3])))),
                static_cast<double>(V::reduce_add(V::add(V::add(sx[0], sx[1]), V::add(sx[2], sx[3]))))};
  for (std::int64_t i = body; i < n; ++i) {
    const double g = static_cast<double>(norm_pulled_scalar<T, Kind>(dy[i], x[i], p, slope));
    sums.g += g;
    sums.g_xc += g * (static_cast<double>(x[i]) - static_cast<double>(p.mean));
  }
  return sums;
}

template <class T, ActivationKind Kind>
void norm_cut(const T* dy, const T* z, T* g, std::int64_t n, T slope) {
  using V = Vec<T>;
  using A = Activated<T, Kind>;
  const typename V::reg leak = V::set1(slope);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu(g + i, A::pull(V::loadu(z + i), V::loadu(dy + i), leak));
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  V::store_partial(g + i, A::pull(V::load_partial(z + i, left), V::load_partial(dy + i, left), leak), left);
}

template <class T, bool Add, ActivationKind Kind>
FEDPAI_INLINE void norm_pull_rows(const T* dy, const T* x, const T* r, T* g, std::int64_t n, NormAffine<T> p) {
  using V = Vec<T>;
  using A = Activated<T, Kind>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    reg v = V::fma(V::sub(V::loadu(x + i), mean), scale, shift);
    if constexpr (Add) v = V::add(v, V::loadu(r + i));
    V::storeu(g + i, A::pull(v, V::loadu(dy + i), v));
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  reg v = norm_partial(x + i, left, p);
  if constexpr (Add) v = V::add(v, V::load_partial(r + i, left));
  V::store_partial(g + i, A::pull(v, V::load_partial(dy + i, left), v), left);
}

template <class T, ActivationKind Kind>
void norm_pull(const T* dy, const T* x, const T* r, T* g, std::int64_t n, NormAffine<T> p) {
  if (r != nullptr) norm_pull_rows<T, true, Kind>(dy, x, r, g, n, p);
  else norm_pull_rows<T, false, Kind>(dy, x, r, g, n, p);
}

template <class T, ActivationKind Kind>
void norm_dx(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> p, T slope, NormPull<T> pull) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  const reg mean_g = V::set1(pull.mean_g), minus_slope = V::set1(-pull.slope);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const reg xc = V::sub(V::loadu(x + i), mean);
    const reg g = norm_pulled<T, Kind>(V::loadu(dy + i), xc, scale, shift, leak);
    V::storeu(dx + i, V::mul(V::fma(xc, minus_slope, V::sub(g, mean_g)), scale));
  }
  for (; i < n; ++i) {
    const T g = norm_pulled_scalar<T, Kind>(dy[i], x[i], p, slope);
    dx[i] = ((g - pull.mean_g) - (x[i] - p.mean) * pull.slope) * p.scale;
  }
}

template <class T, ActivationKind Kind>
void norm_dx_fixed(const T* dy, const T* x, T* dx, std::int64_t n, NormAffine<T> p, T slope) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    reg g = V::loadu(dy + i);
    if constexpr (Kind != kNone) g = norm_pulled<T, Kind>(g, V::sub(V::loadu(x + i), mean), scale, shift, leak);
    V::storeu(dx + i, V::mul(g, scale));
  }
  for (; i < n; ++i) {
    T g = dy[i];
    if constexpr (Kind != kNone) g = norm_pulled_scalar<T, Kind>(g, x[i], p, slope);
    dx[i] = g * p.scale;
  }
}

// One element across which nearest took the other derivative goes to its other neighbour: activations and maps are
// monotonous, so that has the right one, unless two thresholds lie between the neighbours.
template <ActivationKind Kind>
FEDPAI_INLINE Bf16 norm_rounded_scalar(float x, NormAffine<float> p, float slope) {
  const Bf16 nearest = bf16_of(x);
  const float at_x = norm_pulled_scalar<float, Kind>(1.0f, x, p, slope);
  if (norm_pulled_scalar<float, Kind>(1.0f, float_of(nearest), p, slope) == at_x) return nearest;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t toward_zero = bits >> 16;  // the neighbours are this and the next
  return static_cast<Bf16>(2 * toward_zero + 1 - nearest);
}

// A few vectors at a time are rounded to nearest, and one element at a time where a derivative changed among them.
template <ActivationKind Kind>
void norm_round(const float* x, Bf16* y, std::int64_t n, NormAffine<float> p, float slope) {
  using V = Vec<float>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  const reg one = V::set1(1.0f);
  constexpr std::int64_t step = V::lanes * kNormUnroll;
  std::int64_t i = 0;
  for (; i + step <= n; i += step) {
    reg changed = V::zero();
    for (int u = 0; u < kNormUnroll; ++u) {
      const std::int64_t at = i + u * V::lanes;
      const reg v = V::loadu(x + at);
      V::storeu_bf16(y + at, v);
      const reg rounded = V::sub(V::loadu_bf16(y + at), mean);
      const reg d = V::sub(norm_pulled<float, Kind>(one, V::sub(v, mean), scale, shift, leak),
                           norm_pulled<float, Kind>(one, rounded, scale, shift, leak));
      changed = V::fma(d, d, changed);
    }
    if (!(V::reduce_add(changed) > 0.0f)) continue;
    for (std::int64_t j = i; j < i + step; ++j) y[j] = norm_rounded_scalar<Kind>(x[j], p, slope);
  }
  for (; i < n; ++i) y[i] = norm_rounded_scalar<Kind>(x[i], p, slope);
}

template <class T, int Kind = 0>
constexpr void set_norm_kernels(NormKernels<T>& table) {
  constexpr ActivationKind kind = static_cast<ActivationKind>(Kind);
  table.apply[kind] = norm_apply<T, kind>;
  table.apply_add[kind] = norm_apply_add<T, kind>;
  if constexpr (kind < kPiecewiseKinds) {
    table.sums[kind] = norm_sums<T, kind>;
    table.cut[kind] = norm_cut<T, kind>;
    table.dx[kind] = norm_dx<T, kind>;
    table.dx_fixed[kind] = norm_dx_fixed<T, kind>;
    if constexpr (sizeof(T) == sizeof(float)) table.round[kind] = norm_round<kind>;
  } else {
    table.pull[kind] = norm_pull<T, kind>;
  }
  if constexpr (Kind + 1 < kActivationKinds) set_norm_kernels<T, Kind + 1>(table);
}

template <class T>
constexpr NormKernels<T> make_norm_kernels() {
  NormKernels<T> table{};
  table.moments = norm_moments<T>;
  set_norm_kernels(table);
  return table;
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
