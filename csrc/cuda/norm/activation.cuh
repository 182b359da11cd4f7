// SPDX-License-Identifier: Apache-2.0
// Activations of one float, and their derivatives: those of csrc/cpu/norm/activation-inl.h.
//
//   SiLU        x s(x), s(x) = 1 / (1 + exp(-x))                        s(x) (1 + x s(-x))
//   GELU        x Phi(x)                                                Phi(x) + x phi(x)
//   GELU tanh   x s(w), w = x (A + B x^2)                               s(w) + x s(w) s(-w) (A + 3 B x^2)
//
// The piecewise linear ones have torch's bits. The smooth ones are within a few ulp of the exact value in the negative
// tail too: exp(-|x|) is taken as the square of exp(-|x| / 2), whose factors are multiplied one after the other, and the
// tail of the normal distribution as a complementary error function whose argument's rounding is made good. exp and erfc
// are the accurate ones of the device's library, not its approximations.
#pragma once

#include <cmath>

#include "cpu/norm/activation.h"
#include "cuda/common/vector.h"

namespace fedpai::cuda {

// An activation as a template argument of a generic function.
template <ActivationKind Kind>
struct KindOf {
  static constexpr ActivationKind value = Kind;
};

// body(KindOf<kind>()): one branch for a whole walk, not one for each element.
template <class F>
FEDPAI_DEVICE void with_piecewise(int kind, const F& body) {
  if (kind == kRelu) return body(KindOf<kRelu>());
  if (kind == kRelu6) return body(KindOf<kRelu6>());
  if (kind == kLeakyRelu) return body(KindOf<kLeakyRelu>());
  body(KindOf<kNone>());
}

template <class F>
FEDPAI_DEVICE void with_kind(int kind, const F& body) {
  if (kind == kSilu) return body(KindOf<kSilu>());
  if (kind == kGelu) return body(KindOf<kGelu>());
  if (kind == kGeluTanh) return body(KindOf<kGeluTanh>());
  with_piecewise(kind, body);
}

// 1 / (1 + exp(-x)) in parts.
struct Sigmoid {
  float x, half, square, divisor;  // exp(-|x| / 2), its square, and 1 more than that

  FEDPAI_DEVICE explicit Sigmoid(float at) : x(at) {
    half = std::exp(-0.5f * std::fabs(x));
    square = half * half;
    divisor = square + 1.0f;
  }
  FEDPAI_DEVICE float times(float by) const {  // of the sign of x
    const float factor = x > 0.0f ? 1.0f : half;
    return by * factor / divisor * factor;
  }
  FEDPAI_DEVICE float value() const { return (x > 0.0f ? 1.0f : square) / divisor; }
  FEDPAI_DEVICE float rest() const { return (x > 0.0f ? square : 1.0f) / divisor; }  // 1 - value
};

struct NormalTail {
  float tail;  // Phi(-|x|)
  float bell;  // exp(-x^2 / 2)
};

// Phi(-a) = erfc(u + d) / 2 with u = a / sqrt(2) rounded and d what that rounds away: erfc(u) - 2 / sqrt(pi) exp(-u^2) d, up
// to d^2. Without the second term the result would be off by u^2 ulp. Beyond a = 40 nothing is left.
FEDPAI_DEVICE NormalTail normal_tail(float x) {
  constexpr float root_half = 0.70710678118654752f, root_half_rest = 1.2101617e-8f;
  const float size = std::fabs(x), a = size > 40.0f ? 40.0f : size;  // NaN stays NaN
  const float u = a * root_half;
  const float lost = fused_multiply_add(a, root_half, -u) + a * root_half_rest;
  const float bell = std::exp(-u * u);
  return {0.5f * (std::erfc(u) - 1.1283791671f * bell * lost), bell};
}

// w / x of the tanh form is A + B x^2: sqrt(8 / pi) and 0.044715 times that. The argument is cut where s(w) is 0 or 1.
struct GeluTanh {
  static constexpr float kLinear = 1.5957691216f, kCubic = 0.071354816273f;
  float square, argument;

  FEDPAI_DEVICE explicit GeluTanh(float x) {
    const float cut = x > 40.0f ? 40.0f : x < -40.0f ? -40.0f : x;
    square = cut * cut;
    argument = cut * fused_multiply_add(square, kCubic, kLinear);
  }
};

// `slope`: of the leaky ReLU.
template <ActivationKind Kind>
FEDPAI_DEVICE float activated(float v, [[maybe_unused]] float slope) {
  if constexpr (Kind == kRelu) return v < 0.0f ? 0.0f : v;  // NaN stays NaN
  if constexpr (Kind == kRelu6) return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v;
  if constexpr (Kind == kLeakyRelu) return v > 0.0f ? v : v * slope;
  if constexpr (Kind == kSilu) return Sigmoid(v).times(v);
  if constexpr (Kind == kGelu) {
    const float tail = normal_tail(v).tail;
    return v * (v > 0.0f ? 1.0f - tail : tail);
  }
  if constexpr (Kind == kGeluTanh) return Sigmoid(GeluTanh(v).argument).times(v);
  return v;
}

// The derivative at v, times g; of the piecewise linear ones, v may be their result.
template <ActivationKind Kind>
FEDPAI_DEVICE float pulled(float v, float g, [[maybe_unused]] float slope) {
  if constexpr (Kind == kRelu) return v > 0.0f ? g : 0.0f;
  if constexpr (Kind == kRelu6) return v > 0.0f && v < 6.0f ? g : 0.0f;
  if constexpr (Kind == kLeakyRelu) return v > 0.0f ? g : g * slope;
  if constexpr (Kind == kSilu) {
    const Sigmoid s(v);
    return g * (s.value() * fused_multiply_add(v, s.rest(), 1.0f));
  }
  if constexpr (Kind == kGelu) {
    const NormalTail n = normal_tail(v);
    const float below = v > 0.0f ? 1.0f - n.tail : n.tail;
    return g * fused_multiply_add(v, n.bell * 0.3989422804f, below);  // 1 / sqrt(2 pi)
  }
  if constexpr (Kind == kGeluTanh) {
    const GeluTanh w(v);
    const Sigmoid s(w.argument);
    const float value = s.value();
    const float inner = fused_multiply_add(w.square, 3 * GeluTanh::kCubic, GeluTanh::kLinear);
    return g * fused_multiply_add(v * value, s.rest() * inner, value);  // v * inner may overflow where the rest is 0
  }
  return g;
}

}  // namespace fedpai::cuda
