// SPDX-License-Identifier: Apache-2.0
// Loops that do nothing but reach a limit of the machine; one copy per instruction set.
//
//   fma_registers   sum[k] += a * b                  peak multiply-adds: no operand comes from memory
//   fma_loads       sum[k] += a * source[i]          one vector load per multiply-add, from the cache that holds source
//   scale           dest[i] = a * source[i]          STREAM's scale: one load and one store per vector
//
// The first two have as many independent sums as a tile of the convolution, more than two FMAs per cycle of four or five
// cycles' latency need. Scale, because compilers make a plain copy into a call of memcpy, whose stores may pass by the
// caches; the kernels' stores do not, so that a line of dest is read before it is written.
#pragma once

#include "cpu/machine/kernels.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T>
T machine_fma_registers(std::int64_t rounds) {
  using V = Vec<T>;
  constexpr int A = V::accumulators;
  typename V::reg sum[A];
FEDPAI_UNROLL
  for (int k = 0; k < A; ++k) sum[k] = V::set1(static_cast<T>(k));
  const typename V::reg a = V::set1(T(1)), b = V::set1(static_cast<T>(rounds > 0));
  for (std::int64_t r = 0; r < rounds; ++r) {
FEDPAI_UNROLL
    for (int k = 0; k < A; ++k) sum[k] = V::fma(a, b, sum[k]);
  }
FEDPAI_UNROLL
  for (int k = 1; k < A; ++k) sum[0] = V::add(sum[0], sum[k]);
  return V::reduce_add(sum[0]);
}

template <class T>
T machine_fma_loads(const T* source, std::int64_t vectors, std::int64_t rounds) {
  using V = Vec<T>;
  constexpr int A = V::accumulators;
  typename V::reg sum[A];
FEDPAI_UNROLL
  for (int k = 0; k < A; ++k) sum[k] = V::zero();
  const typename V::reg a = V::set1(T(1));
  for (std::int64_t r = 0; r < rounds; ++r) {
    const T* const end = source + vectors * V::lanes;
    for (const T* p = source; p < end; p += A * V::lanes) {
FEDPAI_UNROLL
      for (int k = 0; k < A; ++k) sum[k] = V::fma(a, V::load(p + k * V::lanes), sum[k]);
    }
  }
FEDPAI_UNROLL
  for (int k = 1; k < A; ++k) sum[0] = V::add(sum[0], sum[k]);
  return V::reduce_add(sum[0]);
}

template <class T>
void machine_scale(const T* source, T* dest, std::int64_t elements, T factor) {
  using V = Vec<T>;
  const typename V::reg a = V::set1(factor);
  for (std::int64_t i = 0; i < elements; i += 4 * V::lanes) {
FEDPAI_UNROLL
    for (int k = 0; k < 4; ++k) V::store(dest + i + k * V::lanes, V::mul(a, V::load(source + i + k * V::lanes)));
  }
}

template <class T>
constexpr MachineKernels<T> make_machine_kernels() {
  using V = Vec<T>;
  return {V::lanes,       V::accumulators, V::pinned, machine_fma_registers<T>, machine_fma_loads<T>,
          machine_scale<T>};
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
