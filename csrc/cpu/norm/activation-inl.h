// SPDX-License-Identifier: Apache-2.0
// Activations on vectors, and the pull of their gradients.
//
//   ReLU        max(x, 0)               ReLU6  min(max(x, 0), 6)        leaky ReLU  x where x > 0, else slope * x
//   SiLU        x s(x), s(x) = 1 / (1 + exp(-x))                        s(x) (1 + x s(-x))
//   GELU        x Phi(x)                                                Phi(x) + x phi(x)
//   GELU tanh   x s(w), w = x (A + B x^2)                               s(w) + x s(w) s(-w) (A + 3 B x^2)
//
// The piecewise linear ones have torch's bits. The smooth ones are within a few ulp of the exact value, also where the
// result is tiny, where torch's float32 loses all digits (docs/numerics.md); at infinity they are torch's: x * 0 = NaN
// at minus infinity. exp(-|x|) is the square of exp(-|x| / 2), whose factors are multiplied one after the other: the
// result underflows where it must, and not where exp(-|x|) does.
#pragma once

#include "cpu/norm/activation.h"
#include "cpu/simd/exp-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// 1 / (1 + exp(-x)) in parts.
template <class T>
struct Sigmoid {
  using V = Vec<T>;
  using reg = typename V::reg;
  reg x, half, square, divisor;  // exp(-|x| / 2), its square, and 1 more than that

  explicit FEDPAI_INLINE Sigmoid(const reg& at) : x(at) {
    half = exp_of<T>(V::mul(V::max(x, V::sub(V::zero(), x)), V::set1(T(-0.5))), V::zero());
    square = V::mul(half, half);
    divisor = V::add(square, V::set1(T(1)));
  }
  FEDPAI_INLINE reg times(const reg& by) const {  // of the sign of x
    const reg one = V::set1(T(1)), factor = V::where_gt0(x, one, half);
    return V::mul(V::div(V::mul(by, factor), divisor), factor);
  }
  FEDPAI_INLINE reg value() const { return V::div(V::where_gt0(x, V::set1(T(1)), square), divisor); }
  FEDPAI_INLINE reg rest() const { return V::div(V::where_gt0(x, square, V::set1(T(1))), divisor); }  // 1 - value
};

// w / x of the tanh form, from x^2. sqrt(8 / pi) and 0.044715 times that. The argument is cut where s(w) is 0 or 1.
template <class T>
struct GeluTanh {
  static constexpr T kLinear = T(1.5957691216057307118), kCubic = T(0.071354816272600248776);
};

// apply: the activation. pull: its derivative at v, times g. `slope`: of the leaky ReLU.
template <class T, ActivationKind Kind>
struct Activated {
  using V = Vec<T>;
  using reg = typename V::reg;

  static FEDPAI_INLINE reg apply(const reg& v, [[maybe_unused]] const reg& slope) {
    if constexpr (Kind == kRelu) return V::max(V::zero(), v);  // in this order NaN stays NaN
    if constexpr (Kind == kRelu6) return V::min(V::set1(T(6)), V::max(V::zero(), v));
    if constexpr (Kind == kLeakyRelu) return V::where_gt0(v, v, V::mul(v, slope));
    if constexpr (Kind == kSilu) return Sigmoid<T>(v).times(v);
    if constexpr (Kind == kGelu) {
      const reg tail = normal_tail<T>(v).tail;
      return V::mul(v, V::where_gt0(v, V::sub(V::set1(T(1)), tail), tail));
    }
    if constexpr (Kind == kGeluTanh) {
      const reg c = cut(v);
      return Sigmoid<T>(argument(c, V::mul(c, c))).times(v);
    }
    return v;
  }

  static FEDPAI_INLINE reg pull(const reg& v, const reg& g, [[maybe_unused]] const reg& slope) {
    if constexpr (Kind == kRelu) return V::select_gt0(v, g);
    if constexpr (Kind == kRelu6) return V::select_gt0(v, V::select_gt0(V::sub(V::set1(T(6)), v), g));
    if constexpr (Kind == kLeakyRelu) return V::where_gt0(v, g, V::mul(g, slope));
    if constexpr (Kind == kSilu) {
      const Sigmoid<T> s(v);
      return V::mul(g, V::mul(s.value(), V::fma(v, s.rest(), V::set1(T(1)))));
    }
    if constexpr (Kind == kGelu) {
      const NormalTail<T> n = normal_tail<T>(v);
      const reg below = V::where_gt0(v, V::sub(V::set1(T(1)), n.tail), n.tail);
      return V::mul(g, V::fma(v, V::mul(n.bell, V::set1(T(0.39894228040143267794))), below));  // 1 / sqrt(2 pi)
    }
    if constexpr (Kind == kGeluTanh) {
      const reg c = cut(v), square = V::mul(c, c);
      const Sigmoid<T> s(argument(c, square));
      const reg inner = V::fma(square, V::set1(3 * GeluTanh<T>::kCubic), V::set1(GeluTanh<T>::kLinear));
      const reg value = s.value();  // v * value first: v * inner may overflow where the rest is 0
      return V::mul(g, V::fma(V::mul(v, value), V::mul(s.rest(), inner), value));
    }
    return g;
  }

 private:
  static FEDPAI_INLINE reg cut(const reg& v) { return V::max(V::set1(T(-40)), V::min(V::set1(T(40)), v)); }
  static FEDPAI_INLINE reg argument(const reg& c, const reg& square) {
    return V::mul(c, V::fma(square, V::set1(GeluTanh<T>::kCubic), V::set1(GeluTanh<T>::kLinear)));
  }
};

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
