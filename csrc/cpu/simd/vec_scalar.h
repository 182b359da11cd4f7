// SPDX-License-Identifier: Apache-2.0
// Portable C++: plain loops over an array, for any CPU.
//
// It has the shape of the AVX-512 target (lanes and accumulators), so the schedules that only a 512-bit machine would
// use are walked, and tested, on every machine.
#pragma once

#include "cpu/simd/vec.h"

#define FEDPAI_TARGET scalar
#define FEDPAI_UNROLL  // arrays are not registers: unrolling would only make the build slow

namespace fedpai::scalar {
namespace {

template <class T>
struct Vec {
  static constexpr int lanes = static_cast<int>(64 / sizeof(T));
  static constexpr int accumulators = 28;
  static constexpr int pinned = 26;
  static constexpr int panel = 24;
  struct alignas(64) reg {
    T x[lanes];
  };

  template <class F>
  static FEDPAI_INLINE reg each(F&& f) {
    reg r;
    for (int i = 0; i < lanes; ++i) r.x[i] = f(i);
    return r;
  }
  static FEDPAI_INLINE reg zero() { return set1(T(0)); }
  static FEDPAI_INLINE reg set1(T v) {
    return each([&](int) { return v; });
  }
  static FEDPAI_INLINE reg load(const T* p) {
    return each([&](int i) { return p[i]; });
  }
  static FEDPAI_INLINE reg loadu(const T* p) { return load(p); }
  static FEDPAI_INLINE void store(T* p, const reg& v) {
    for (int i = 0; i < lanes; ++i) p[i] = v.x[i];
  }
  static FEDPAI_INLINE void storeu(T* p, const reg& v) { store(p, v); }
  static FEDPAI_INLINE void store_past(T* p, const reg& v) { store(p, v); }
  static FEDPAI_INLINE void fence() {}
  static FEDPAI_INLINE reg loadu_bf16(const std::uint16_t* p) {
    return each([&](int i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(p[i]) << 16;
      float x;
      __builtin_memcpy(&x, &bits, sizeof x);
      return x;
    });
  }
  static FEDPAI_INLINE void storeu_bf16(std::uint16_t* p, const reg& v) {
    for (int i = 0; i < lanes; ++i) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, &v.x[i], sizeof bits);
      const std::uint32_t upper = bits >> 16;
      const std::uint32_t rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
      p[i] = static_cast<std::uint16_t>(v.x[i] != v.x[i] ? upper | 0x40u : rounded);
    }
  }
  static FEDPAI_INLINE reg loadu_f32(const float* p) {
    return each([&](int i) { return static_cast<T>(p[i]); });
  }
  static FEDPAI_INLINE void storeu_f32(float* p, const reg& v) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<float>(v.x[i]);
  }
  static FEDPAI_INLINE reg load_partial(const T* p, int n) {
    return each([&](int i) { return i < n ? p[i] : T(0); });
  }
  static FEDPAI_INLINE void store_partial(T* p, const reg& v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v.x[i];
  }
  static FEDPAI_INLINE reg add(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] + b.x[i]; });
  }
  static FEDPAI_INLINE reg sub(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] - b.x[i]; });
  }
  static FEDPAI_INLINE reg mul(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] * b.x[i]; });
  }
  static FEDPAI_INLINE reg div(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] / b.x[i]; });
  }
  // The second operand wins a comparison with NaN, as in the x86 instructions.
  static FEDPAI_INLINE reg max(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static FEDPAI_INLINE reg min(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
  }
  static FEDPAI_INLINE reg sqrt(const reg& a) {
    return each([&](int i) {
      if constexpr (sizeof(T) == 4) return __builtin_sqrtf(a.x[i]);
      else return __builtin_sqrt(a.x[i]);
    });
  }
  // Two roundings: a software fma would be some twenty times slower.
  static FEDPAI_INLINE reg fma(const reg& a, const reg& b, const reg& c) {
    return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static FEDPAI_INLINE reg select_gt0(const reg& a, const reg& b) {
    return each([&](int i) { return a.x[i] > T(0) ? b.x[i] : T(0); });
  }
  static FEDPAI_INLINE reg where_gt0(const reg& a, const reg& b, const reg& c) {
    return each([&](int i) { return a.x[i] > T(0) ? b.x[i] : c.x[i]; });
  }
  static FEDPAI_INLINE reg pow2(const reg& n) {
    return each([&](int i) {
      T power;
      if constexpr (sizeof(T) == 4) {
        const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.x[i]) + 127) << 23;
        __builtin_memcpy(&power, &bits, sizeof(T));
      } else {
        const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(n.x[i]) + 1023) << 52;
        __builtin_memcpy(&power, &bits, sizeof(T));
      }
      return power;
    });
  }
  static FEDPAI_INLINE T reduce_add(const reg& v) {
    reg s = v;
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) s.x[i] += s.x[i + half];
    }
    return s.x[0];
  }
  static FEDPAI_INLINE void transpose(reg (&r)[lanes]) {
    alignas(64) T rows[lanes][lanes], columns[lanes][lanes];
    for (int i = 0; i < lanes; ++i) store(rows[i], r[i]);
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < lanes; ++j) columns[j][i] = rows[i][j];
    }
    for (int i = 0; i < lanes; ++i) r[i] = load(columns[i]);
  }
  static FEDPAI_INLINE reg fold(const reg& a, const reg& b) {
    reg s = zero();
    s.x[0] = reduce_add(a);
    s.x[1] = reduce_add(b);
    return s;
  }
  static FEDPAI_INLINE void add_folded(T* sums, const reg& ab, const reg& cd) {
    sums[0] += ab.x[0];
    sums[1] += ab.x[1];
    sums[2] += cd.x[0];
    sums[3] += cd.x[1];
  }
};

}  // namespace
}  // namespace fedpai::scalar
