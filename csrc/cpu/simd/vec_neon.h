// SPDX-License-Identifier: Apache-2.0
// AArch64 Advanced SIMD: 4 floats or 2 doubles, 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/vec.h"

#define FEDPAI_TARGET neon
#define FEDPAI_UNROLL _Pragma("GCC unroll 28")

namespace fedpai::neon {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using reg = float32x4_t;
  static constexpr int lanes = 4;
  static constexpr int accumulators = 24;
  static constexpr int pinned = 22;
  static constexpr int panel = 24;

  static FEDPAI_INLINE reg zero() { return vdupq_n_f32(0.0f); }
  static FEDPAI_INLINE reg set1(float x) { return vdupq_n_f32(x); }
  static FEDPAI_INLINE reg load(const float* p) { return vld1q_f32(p); }
  static FEDPAI_INLINE reg loadu(const float* p) { return vld1q_f32(p); }
  static FEDPAI_INLINE void store(float* p, reg v) { vst1q_f32(p, v); }
  static FEDPAI_INLINE void storeu(float* p, reg v) { vst1q_f32(p, v); }
  static FEDPAI_INLINE void store_past(float* p, reg v) { storeu(p, v); }
  static FEDPAI_INLINE void fence() {}
  static FEDPAI_INLINE reg loadu_bf16(const std::uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static FEDPAI_INLINE void storeu_bf16(std::uint16_t* p, reg v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t half = vaddq_u32(vdupq_n_u32(0x7fff), vandq_u32(upper, vdupq_n_u32(1)));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
    const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet)));
  }
  static FEDPAI_INLINE reg load_partial(const float* p, int n) {
    float t[lanes] = {0, 0, 0, 0};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return vld1q_f32(t);
  }
  static FEDPAI_INLINE void store_partial(float* p, reg v, int n) {
    float t[lanes];
    vst1q_f32(t, v);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }
  static FEDPAI_INLINE reg add(reg a, reg b) { return vaddq_f32(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return vsubq_f32(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return vmulq_f32(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return vdivq_f32(a, b); }
  // The second operand wins a comparison with NaN, as in the x86 instructions.
  static FEDPAI_INLINE reg max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return vsqrtq_f32(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a), vreinterpretq_u32_f32(b)));
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) { return vbslq_f32(vcgtzq_f32(a), b, c); }
  static FEDPAI_INLINE reg pow2(reg n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static FEDPAI_INLINE float reduce_add(reg v) {
    const float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    const reg a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]), c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) { return vpaddq_f32(a, b); }
  static FEDPAI_INLINE void add_folded(float* sums, reg ab, reg cd) {
    vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vpaddq_f32(ab, cd)));
  }
};

template <>
struct Vec<double> {
  using reg = float64x2_t;
  static constexpr int lanes = 2;
  static constexpr int accumulators = 24;
  static constexpr int pinned = 22;
  static constexpr int panel = 24;

  static FEDPAI_INLINE reg zero() { return vdupq_n_f64(0.0); }
  static FEDPAI_INLINE reg set1(double x) { return vdupq_n_f64(x); }
  static FEDPAI_INLINE reg load(const double* p) { return vld1q_f64(p); }
  static FEDPAI_INLINE reg loadu(const double* p) { return vld1q_f64(p); }
  static FEDPAI_INLINE void store(double* p, reg v) { vst1q_f64(p, v); }
  static FEDPAI_INLINE void storeu(double* p, reg v) { vst1q_f64(p, v); }
  static FEDPAI_INLINE void store_past(double* p, reg v) { storeu(p, v); }
  static FEDPAI_INLINE void fence() {}
  static FEDPAI_INLINE reg loadu_f32(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
  static FEDPAI_INLINE void storeu_f32(float* p, reg v) { vst1_f32(p, vcvt_f32_f64(v)); }
  static FEDPAI_INLINE reg load_partial(const double* p, int n) {
    double t[lanes] = {0, 0};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return vld1q_f64(t);
  }
  static FEDPAI_INLINE void store_partial(double* p, reg v, int n) {
    double t[lanes];
    vst1q_f64(t, v);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }
  static FEDPAI_INLINE reg add(reg a, reg b) { return vaddq_f64(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return vsubq_f64(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return vmulq_f64(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return vdivq_f64(a, b); }
  static FEDPAI_INLINE reg max(reg a, reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return vbslq_f64(vcltq_f64(a, b), a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return vsqrtq_f64(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f64(c, a, b); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return vreinterpretq_f64_u64(vandq_u64(vcgtzq_f64(a), vreinterpretq_u64_f64(b)));
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) { return vbslq_f64(vcgtzq_f64(a), b, c); }
  static FEDPAI_INLINE reg pow2(reg n) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023)), 52));
  }
  static FEDPAI_INLINE double reduce_add(reg v) { return vgetq_lane_f64(v, 0) + vgetq_lane_f64(v, 1); }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    const reg first = vzip1q_f64(r[0], r[1]);
    r[1] = vzip2q_f64(r[0], r[1]);
    r[0] = first;
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) { return vpaddq_f64(a, b); }
  static FEDPAI_INLINE void add_folded(double* sums, reg ab, reg cd) {
    vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), ab));
    vst1q_f64(sums + 2, vaddq_f64(vld1q_f64(sums + 2), cd));
  }
};

}  // namespace
}  // namespace fedpai::neon
