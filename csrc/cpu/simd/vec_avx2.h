// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA: 8 floats or 4 doubles, 16 registers.
#pragma once

#include <immintrin.h>

#include "cpu/simd/vec.h"

#define FEDPAI_TARGET avx2
#define FEDPAI_UNROLL _Pragma("GCC unroll 28")

namespace fedpai::avx2 {
namespace {

template <class T>
struct Vec;

// Row (lanes - n) of this table has its first n lanes set.
alignas(64) constexpr std::int32_t kPartialMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) constexpr std::int64_t kPartialMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

template <>
struct Vec<float> {
  using reg = __m256;
  static constexpr int lanes = 8;
  static constexpr int accumulators = 14;  // 16 less the broadcast weight and one spare; loads fold into the FMA
  static constexpr int pinned = 12;
  static constexpr int panel = 12;

  static FEDPAI_INLINE reg zero() { return _mm256_setzero_ps(); }
  static FEDPAI_INLINE reg set1(float x) { return _mm256_set1_ps(x); }
  static FEDPAI_INLINE reg load(const float* p) { return _mm256_load_ps(p); }
  static FEDPAI_INLINE reg loadu(const float* p) { return _mm256_loadu_ps(p); }
  static FEDPAI_INLINE void store(float* p, reg v) { _mm256_store_ps(p, v); }
  static FEDPAI_INLINE void storeu(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static FEDPAI_INLINE void store_past(float* p, reg v) { _mm256_stream_ps(p, v); }
  static FEDPAI_INLINE void fence() { _mm_sfence(); }
  static FEDPAI_INLINE reg loadu_bf16(const std::uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static FEDPAI_INLINE void storeu_bf16(std::uint16_t* p, reg v) {
    const __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i halves = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static FEDPAI_INLINE __m256i partial_mask(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPartialMask32 + (lanes - n)));
  }
  static FEDPAI_INLINE reg load_partial(const float* p, int n) { return _mm256_maskload_ps(p, partial_mask(n)); }
  static FEDPAI_INLINE void store_partial(float* p, reg v, int n) { _mm256_maskstore_ps(p, partial_mask(n), v); }
  static FEDPAI_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static FEDPAI_INLINE reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return _mm256_sqrt_ps(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), b);
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) {
    return _mm256_blendv_ps(c, b, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ));
  }
  static FEDPAI_INLINE reg pow2(reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static FEDPAI_INLINE float reduce_add(reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    reg pairs[lanes], fours[lanes];
FEDPAI_UNROLL
    for (int i = 0; i < lanes; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
FEDPAI_UNROLL
    for (int i = 0; i < lanes; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
FEDPAI_UNROLL
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) { return _mm256_hadd_ps(a, b); }
  static FEDPAI_INLINE void add_folded(float* sums, reg ab, reg cd) {
    const __m256 v = _mm256_hadd_ps(ab, cd);
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), s));
  }
};

template <>
struct Vec<double> {
  using reg = __m256d;
  static constexpr int lanes = 4;
  static constexpr int accumulators = 14;
  static constexpr int pinned = 12;
  static constexpr int panel = 12;

  static FEDPAI_INLINE reg zero() { return _mm256_setzero_pd(); }
  static FEDPAI_INLINE reg set1(double x) { return _mm256_set1_pd(x); }
  static FEDPAI_INLINE reg load(const double* p) { return _mm256_load_pd(p); }
  static FEDPAI_INLINE reg loadu(const double* p) { return _mm256_loadu_pd(p); }
  static FEDPAI_INLINE void store(double* p, reg v) { _mm256_store_pd(p, v); }
  static FEDPAI_INLINE void storeu(double* p, reg v) { _mm256_storeu_pd(p, v); }
  static FEDPAI_INLINE void store_past(double* p, reg v) { _mm256_stream_pd(p, v); }
  static FEDPAI_INLINE void fence() { _mm_sfence(); }
  static FEDPAI_INLINE reg loadu_f32(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static FEDPAI_INLINE void storeu_f32(float* p, reg v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  static FEDPAI_INLINE __m256i partial_mask(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPartialMask64 + (lanes - n)));
  }
  static FEDPAI_INLINE reg load_partial(const double* p, int n) { return _mm256_maskload_pd(p, partial_mask(n)); }
  static FEDPAI_INLINE void store_partial(double* p, reg v, int n) { _mm256_maskstore_pd(p, partial_mask(n), v); }
  static FEDPAI_INLINE reg add(reg a, reg b) { return _mm256_add_pd(a, b); }
  static FEDPAI_INLINE reg sub(reg a, reg b) { return _mm256_sub_pd(a, b); }
  static FEDPAI_INLINE reg mul(reg a, reg b) { return _mm256_mul_pd(a, b); }
  static FEDPAI_INLINE reg div(reg a, reg b) { return _mm256_div_pd(a, b); }
  static FEDPAI_INLINE reg max(reg a, reg b) { return _mm256_max_pd(a, b); }
  static FEDPAI_INLINE reg min(reg a, reg b) { return _mm256_min_pd(a, b); }
  static FEDPAI_INLINE reg sqrt(reg a) { return _mm256_sqrt_pd(a); }
  static FEDPAI_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_pd(a, b, c); }
  static FEDPAI_INLINE reg select_gt0(reg a, reg b) {
    return _mm256_and_pd(_mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_GT_OQ), b);
  }
  static FEDPAI_INLINE reg where_gt0(reg a, reg b, reg c) {
    return _mm256_blendv_pd(c, b, _mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_GT_OQ));
  }
  static FEDPAI_INLINE reg pow2(reg n) {
    const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
  }
  static FEDPAI_INLINE double reduce_add(reg v) {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    s = _mm_add_sd(s, _mm_unpackhi_pd(s, s));
    return _mm_cvtsd_f64(s);
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    const reg a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const reg c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
  static FEDPAI_INLINE reg fold(reg a, reg b) { return _mm256_hadd_pd(a, b); }
  static FEDPAI_INLINE void add_folded(double* sums, reg ab, reg cd) {
    const __m256d s = _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), s));
  }
};

}  // namespace
}  // namespace fedpai::avx2
