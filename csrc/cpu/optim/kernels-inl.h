// SPDX-License-Identifier: Apache-2.0
// One optimiser step over n elements, each read once and written once.
//
//   SGD     g = sign * g [+ weight_decay * p]                                       sign: -1 to maximise
//           b = momentum * b + (1 - dampening) * g                                  the first time b = g
//           p = p - lr * (b; with Nesterov g + momentum * b; without momentum g)
//   Adam    g = sign * g [+ weight_decay * p], or p = p * (1 - lr * weight_decay)   AdamW
//           m = m + (1 - beta1) * (g - m),  v = beta2 * v + (1 - beta2) * g * g     [v_max = max(v_max, v)]
//           p = p - lr / (1 - beta1^t) * m / (sqrt(v or v_max) / sqrt(1 - beta2^t) + eps)
//
// Order: that of torch's own plain loops, one vector operation for each of their passes, so that the results of SGD have
// the same bits where both use fused multiply-adds: `p + a * x` is one fma, `b * momentum` is rounded before anything is
// added. Adam divides where torch divides, but may differ in the last bit: the root here is rounded correctly, that of
// the vector library that torch was built with need not be. Scalars are computed in double and rounded once. A factor
// that is zero is skipped as torch skips it (weight decay, momentum): 0 * inf would be NaN.
//
// Layout: any n elements that lie side by side, in the same order in all arrays. A tail goes through masked loads and
// the same operations, so a result does not depend on where a thread's share begins.
// Bound: memory. Bytes moved per float32 parameter, the least there can be:
//
//   SGD 12, with momentum 20; Adam 28, with amsgrad 36
//
// where a pass each for weight decay, momentum (two) and update moves 44. benchmarks/bench_optim.py measures it beside
// torch's forms.
#pragma once

#include "cpu/optim/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// Whole vectors.
template <class T>
struct WholeAccess {
  static FEDPAI_INLINE typename Vec<T>::reg load(const T* p, int) { return Vec<T>::loadu(p); }
  static FEDPAI_INLINE void store(T* p, const typename Vec<T>::reg& v, int) { Vec<T>::storeu(p, v); }
};

// The first n lanes.
template <class T>
struct PartAccess {
  static FEDPAI_INLINE typename Vec<T>::reg load(const T* p, int n) { return Vec<T>::load_partial(p, n); }
  static FEDPAI_INLINE void store(T* p, const typename Vec<T>::reg& v, int n) { Vec<T>::store_partial(p, v, n); }
};

// Runs vector(first element, lanes, how to load and store) over n elements.
template <class T, class F>
FEDPAI_INLINE void optim_vectors(std::int64_t n, const F& vector) {
  constexpr int lanes = Vec<T>::lanes;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) vector(i, lanes, WholeAccess<T>{});
  if (i < n) vector(i, static_cast<int>(n - i), PartAccess<T>{});
}

enum class SgdForm { kPlain, kFirst, kFirstNesterov, kRunning, kRunningNesterov };

template <class T, SgdForm Form, bool Decay>
void sgd_form(T* p, const T* g, T* buffer, std::int64_t n, const SgdFactors<T>& f) {
  using V = Vec<T>;
  using reg = typename V::reg;
  constexpr bool running = Form == SgdForm::kRunning || Form == SgdForm::kRunningNesterov;
  constexpr bool nesterov = Form == SgdForm::kFirstNesterov || Form == SgdForm::kRunningNesterov;
  const reg sign = V::set1(f.sign), decay = V::set1(f.weight_decay), momentum = V::set1(f.momentum);
  const reg undamped = V::set1(f.undamped), minus_lr = V::set1(f.minus_lr);
  optim_vectors<T>(n, [&](std::int64_t i, int lanes, auto access) __attribute__((always_inline)) {
    const reg x = access.load(p + i, lanes);
    reg grad = V::mul(access.load(g + i, lanes), sign);
    if constexpr (Decay) grad = V::fma(x, decay, grad);
    if constexpr (Form != SgdForm::kPlain) {
      reg b = grad;
      if constexpr (running) b = V::fma(grad, undamped, V::mul(access.load(buffer + i, lanes), momentum));
      access.store(buffer + i, b, lanes);
      grad = nesterov ? V::fma(b, momentum, grad) : b;
    }
    access.store(p + i, V::fma(grad, minus_lr, x), lanes);
  });
}

template <class T, SgdForm Form>
void sgd_decay(T* p, const T* g, T* buffer, std::int64_t n, const SgdFactors<T>& f) {
  if (f.decays) {
    sgd_form<T, Form, true>(p, g, buffer, n, f);
  } else {
    sgd_form<T, Form, false>(p, g, buffer, n, f);
  }
}

template <class T>
void optim_sgd(T* p, const T* g, T* buffer, std::int64_t n, const SgdFactors<T>& f) {
  if (!f.has_momentum) return sgd_decay<T, SgdForm::kPlain>(p, g, buffer, n, f);
  if (f.first) {
    return f.nesterov ? sgd_decay<T, SgdForm::kFirstNesterov>(p, g, buffer, n, f)
                      : sgd_decay<T, SgdForm::kFirst>(p, g, buffer, n, f);
  }
  return f.nesterov ? sgd_decay<T, SgdForm::kRunningNesterov>(p, g, buffer, n, f)
                    : sgd_decay<T, SgdForm::kRunning>(p, g, buffer, n, f);
}

template <class T, AdamDecay Decay, bool Amsgrad>
void adam_form(T* p, const T* g, T* m, T* v, T* v_max, std::int64_t n, const AdamFactors<T>& f) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg sign = V::set1(f.sign), decay = V::set1(f.weight_decay), keep = V::set1(f.keep);
  const reg pull = V::set1(f.pull_is_large ? f.pull - T(1) : f.pull);
  const reg beta2 = V::set1(f.beta2), one_minus_beta2 = V::set1(f.one_minus_beta2);
  const reg correction = V::set1(f.correction), eps = V::set1(f.eps), minus_step = V::set1(f.minus_step);
  const bool from_grad = f.pull_is_large;
  optim_vectors<T>(n, [&](std::int64_t i, int lanes, auto access) __attribute__((always_inline)) {
    reg x = access.load(p + i, lanes);
    reg grad = V::mul(access.load(g + i, lanes), sign);
    if constexpr (Decay == AdamDecay::kGradient) grad = V::fma(x, decay, grad);
    if constexpr (Decay == AdamDecay::kParameter) x = V::mul(x, keep);
    const reg before = access.load(m + i, lanes);
    const reg mean = V::fma(pull, V::sub(grad, before), from_grad ? grad : before);
    reg square = V::mul(access.load(v + i, lanes), beta2);
    square = V::fma(V::mul(one_minus_beta2, grad), grad, square);
    access.store(m + i, mean, lanes);
    access.store(v + i, square, lanes);
    if constexpr (Amsgrad) {
      // In this order NaN stays NaN: v_max holds one only where v does.
      square = V::max(access.load(v_max + i, lanes), square);
      access.store(v_max + i, square, lanes);
    }
    const reg scale = V::add(V::div(V::sqrt(square), correction), eps);
    access.store(p + i, V::add(x, V::div(V::mul(minus_step, mean), scale)), lanes);
  });
}

template <class T, bool Amsgrad>
void adam_decay(T* p, const T* g, T* m, T* v, T* v_max, std::int64_t n, const AdamFactors<T>& f) {
  switch (f.decay) {
    case AdamDecay::kNone:
      return adam_form<T, AdamDecay::kNone, Amsgrad>(p, g, m, v, v_max, n, f);
    case AdamDecay::kGradient:
      return adam_form<T, AdamDecay::kGradient, Amsgrad>(p, g, m, v, v_max, n, f);
    case AdamDecay::kParameter:
      return adam_form<T, AdamDecay::kParameter, Amsgrad>(p, g, m, v, v_max, n, f);
  }
}

template <class T>
void optim_adam(T* p, const T* g, T* m, T* v, T* v_max, std::int64_t n, const AdamFactors<T>& f) {
  if (v_max != nullptr) {
    adam_decay<T, true>(p, g, m, v, v_max, n, f);
  } else {
    adam_decay<T, false>(p, g, m, v, nullptr, n, f);
  }
}

template <class T>
constexpr OptimKernels<T> make_optim_kernels() {
  return {optim_sgd<T>, optim_adam<T>};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
