// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles, 32 registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/vec.h"

#define FEDPAI_TARGET avx512
#define FEDPAI_UNROLL _Pragma("GCC unroll 28")

namespace fedpai::avx512 {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using reg = __m512;
  static constexpr int lanes = 16;
  static constexpr int accumulators = 28;
  static constexpr int pinned = 26;
  static constexpr int panel = 24;

  static FEDPAI_INLINE reg zero() { return _mm512_setzero_ps(); }
  static FEDPAI_INLINE reg set1(float x) { return _mm512_set1_ps(x); }
  static FEDPAI_INLINE reg load(const float* p) { return _mm512_load_ps(p); }
  static FEDPAI_INLINE reg loadu(const float* p) { return _mm512_loadu_ps(p); }
  static FEDPAI_INLINE void store(float* p, reg v) { _mm512_store_ps(p, v); }
  static FEDPAI_INLINE void storeu(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static FEDPAI_INLINE void store_past(float* p, reg v) { _mm512_stream_ps(p, v); }
  static FEDPAI_INLINE void fence() { _mm_sfence(); }
  static FEDPAI_INLINE reg loadu_bf16(const std::uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static FEDPAI_INLINE void storeu_bf16(std::uint16_t* p, reg v) {
    const __m512i bits = _mm512_castps_si512(v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(upper, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i halves = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), upper,
                                                _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
  }
  static FEDPAI_INLINE __mmask16 partial_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static FEDPAI_INLINE reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(partial_mask(n), p); }
  static FEDPAI_INLINE void store_partial(float* p, reg v, int n) { _mm512_mask_storeu_ps(p, partial_mask(n), v); }
  static FEDPAI_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static FEDPAI_INLINE reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return _mm512_sqrt_ps(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), b);
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), c, b);
  }
  static FEDPAI_INLINE reg pow2(reg n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static FEDPAI_INLINE float reduce_add(reg v) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    alignas(64) float rows[lanes][lanes], columns[lanes][lanes];
    for (int i = 0; i < lanes; ++i) store(rows[i], r[i]);
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < lanes; ++j) columns[j][i] = rows[i][j];
    }
    for (int i = 0; i < lanes; ++i) r[i] = load(columns[i]);
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  static FEDPAI_INLINE void add_folded(float* sums, reg ab, reg cd) {
    const __m512 v = fold(ab, cd);
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), s));
  }
};

template <>
struct Vec<double> {
  using reg = __m512d;
  static constexpr int lanes = 8;
  static constexpr int accumulators = 28;
  static constexpr int pinned = 26;
  static constexpr int panel = 24;

  static FEDPAI_INLINE reg zero() { return _mm512_setzero_pd(); }
  static FEDPAI_INLINE reg set1(double x) { return _mm512_set1_pd(x); }
  static FEDPAI_INLINE reg load(const double* p) { return _mm512_load_pd(p); }
  static FEDPAI_INLINE reg loadu(const double* p) { return _mm512_loadu_pd(p); }
  static FEDPAI_INLINE void store(double* p, reg v) { _mm512_store_pd(p, v); }
  static FEDPAI_INLINE void storeu(double* p, reg v) { _mm512_storeu_pd(p, v); }
  static FEDPAI_INLINE void store_past(double* p, reg v) { _mm512_stream_pd(p, v); }
  static FEDPAI_INLINE void fence() { _mm_sfence(); }
  static FEDPAI_INLINE reg loadu_f32(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static FEDPAI_INLINE void storeu_f32(float* p, reg v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  static FEDPAI_INLINE __mmask8 partial_mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static FEDPAI_INLINE reg load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd(partial_mask(n), p); }
  static FEDPAI_INLINE void store_partial(double* p, reg v, int n) { _mm512_mask_storeu_pd(p, partial_mask(n), v); }
  static FEDPAI_INLINE reg add(reg a, reg b) { return _mm512_add_pd(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return _mm512_sub_pd(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return _mm512_mul_pd(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return _mm512_div_pd(a, b); }
  static FEDPAI_INLINE reg max(reg a, reg b) { return _mm512_max_pd(a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return _mm512_min_pd(a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return _mm512_sqrt_pd(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_pd(a, b, c); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, _mm512_setzero_pd(), _CMP_GT_OQ), b);
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, _mm512_setzero_pd(), _CMP_GT_OQ), c, b);
  }
  static FEDPAI_INLINE reg pow2(reg n) {
    const __m512i exponent = _mm512_add_epi64(_mm512_cvtpd_epi64(n), _mm512_set1_epi64(1023));
    return _mm512_castsi512_pd(_mm512_slli_epi64(exponent, 52));
  }
  static FEDPAI_INLINE double reduce_add(reg v) {
    const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    s = _mm_add_sd(s, _mm_unpackhi_pd(s, s));
    return _mm_cvtsd_f64(s);
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    alignas(64) double rows[lanes][lanes], columns[lanes][lanes];
    for (int i = 0; i < lanes; ++i) store(rows[i], r[i]);
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < lanes; ++j) columns[j][i] = rows[i][j];
    }
    for (int i = 0; i < lanes; ++i) r[i] = load(columns[i]);
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) { return _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)); }
  static FEDPAI_INLINE void add_folded(double* sums, reg ab, reg cd) {
    const __m256d x = _mm256_add_pd(_mm512_castpd512_pd256(ab), _mm512_extractf64x4_pd(ab, 1));
    const __m256d y = _mm256_add_pd(_mm512_castpd512_pd256(cd), _mm512_extractf64x4_pd(cd, 1));
    const __m256d s = _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), s));
  }
};

}  // namespace
}  // namespace fedpai::avx512
