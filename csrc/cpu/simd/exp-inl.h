// SPDX-License-Identifier: Apache-2.0
// The exponential of what is not positive, and the tail of the normal distribution, on vectors.
//
// exp(a): a = n ln 2 + r with |r| <= ln 2 / 2, then 2^n (1 + r + r^2 p(r)). n ln 2 is taken off in two parts, of which
// the first has so few bits that its product with n is exact. p interpolates (e^r - 1 - r) / r^2 at Chebyshev nodes;
// its own error is 0.2 ulp in float, 0.1 in double. The result is off by at most 2 ulp, and 0 below kExpLowest, where
// 2^n would stop being a normal number.
//
// Phi(-a), a >= 0: exp(-a^2 / 2) P(t) / (a + K) with t = (a - K) / (a + K). What remains after the exponential, the
// scaled complementary error function, falls as 1 / a, so that its product with a + K is nearly a polynomial in t, from
// 0 to infinity. P interpolates it at Chebyshev nodes (computed with 60 digits). a^2 is split into an exact part and a
// rest: at a = 13 a rounded square would cost 40 ulp.
#pragma once

#include "cpu/simd/vec.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -87.0f;
  static constexpr float integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer,
  static constexpr float fraction = 49152.0f;    // and this to a multiple of 2^-8, whose square is exact below 16
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2 = 0.69287109375f;
  static constexpr float ln2_rest = 0.00027608680995f;
  static constexpr float p[] = {0.5f, 0.16666576666f, 0.041666554213f, 0.0083632328837f, 0.0013926250831f};
  static constexpr float K = 3.0f;
  static constexpr float P[] = {0.72908369067f,   -0.50933199024f, 0.23001767971f,     -0.047262727689f,
                                -0.010462311158f, 0.0069696895432f, 0.0010241576682f,   -0.0010338913481f,
                                -0.00024448394209f, 0.00013282590865f, 5.5174623938e-5f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -708.0;
  static constexpr double integer = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double fraction = 103079215104.0;     // 1.5 * 2^36: multiples of 2^-16
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2 = 0.6931471803691238164901733;
  static constexpr double ln2_rest = 1.9082149292705878161e-10;
  static constexpr double p[] = {0.50000000000000010314,    0.1666666666666666746,     0.041666666666623820532,
                                 0.0083333333333300381973,  0.0013888888917367080562,  0.00019841269863171556026,
                                 0.000024801521057868205199, 2.7557268276905696187e-6, 2.7620201591031548792e-7,
                                 2.5100472505694996003e-8};
  static constexpr double K = 5.0;
  static constexpr double P[] = {
      0.76919304975006295856,     -0.66538250289005670039,    0.49530561596997641327,    -0.3135331566713045447,
      0.16502036617038471792,     -0.069118638706310163575,   0.020795066799883179639,   -0.0029933767705085424387,
      -0.00079786939846607010544, 0.00054489906477312989385,  -0.000059375728009915863678, -0.00004976281427058580517,
      0.000016681213742042061453, 3.9809021578680411194e-6,   -2.7692670959974302454e-6, -3.3661536810124711722e-7,
      4.3314103568625849535e-7,   4.2274993740065348384e-8,   -6.5942216624772230429e-8, -9.3135609943260591435e-9,
      7.6630718007600410458e-9,   1.7530484014082319805e-9,   -1.5877468827473365378e-10};
};

template <class T, int N>
FEDPAI_INLINE typename Vec<T>::reg horner(const T (&coefficient)[N], const typename Vec<T>::reg& x) {
  using V = Vec<T>;
  typename V::reg sum = V::set1(coefficient[N - 1]);
FEDPAI_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = V::fma(sum, x, V::set1(coefficient[i]));
  return sum;
}

// exp(argument + rest) for argument + rest <= 0, |rest| much less than 1; of NaN 0.
template <class T>
FEDPAI_INLINE typename Vec<T>::reg exp_of(const typename Vec<T>::reg& argument,
                                          const typename Vec<T>::reg& rest) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  using reg = typename V::reg;
  const reg lowest = V::set1(C::lowest), integer = V::set1(C::integer);
  const reg inside = V::sub(V::add(argument, rest), lowest);
  const reg a = V::max(argument, lowest);  // which NaN becomes too
  const reg n = V::sub(V::fma(V::add(a, rest), V::set1(C::log2e), integer), integer);
  reg r = V::fma(n, V::set1(-C::ln2), a);
  r = V::fma(n, V::set1(-C::ln2_rest), r);
  r = V::add(r, rest);
  const reg fraction = V::fma(V::mul(r, r), horner<T>(C::p, r), r);
  return V::where_gt0(inside, V::mul(V::add(fraction, V::set1(T(1))), V::pow2(n)), V::zero());
}

template <class T>
struct NormalTail {
  typename Vec<T>::reg tail;  // Phi(-|x|)
  typename Vec<T>::reg bell;  // exp(-x^2 / 2)
};

// Of any x, infinities included; both are 0 where exp(-x^2 / 2) is, and some number for NaN.
template <class T>
FEDPAI_INLINE NormalTail<T> normal_tail(const typename Vec<T>::reg& x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  using reg = typename V::reg;
  const reg a = V::min(V::max(x, V::sub(V::zero(), x)), V::set1(T(40)));  // beyond which nothing is left
  const reg fraction = V::set1(C::fraction), minus_half = V::set1(T(-0.5));
  const reg coarse = V::sub(V::add(a, fraction), fraction);
  const reg rest = V::mul(V::mul(V::sub(a, coarse), V::add(a, coarse)), minus_half);
  const reg bell = exp_of<T>(V::mul(V::mul(coarse, coarse), minus_half), rest);
  const reg q = V::div(V::set1(T(1)), V::add(a, V::set1(C::K)));
  const reg t = V::mul(V::sub(a, V::set1(C::K)), q);
  return {V::mul(V::mul(bell, horner<T>(C::P, t)), q), bell};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
