// SPDX-License-Identifier: Apache-2.0
// The vector interface that every kernel is written against.
//
// A target file (cpu/targets/<isa>.cpp) includes exactly one vec_<isa>.h and then the kernels' -inl.h files. Each
// vec_<isa>.h opens namespace fedpai::<isa> and defines there
//
//   template <class T> struct Vec     T = float | double
//     using reg                       one vector register (or what stands for it)
//     static constexpr int lanes      elements per register
//     static constexpr int accumulators   registers a kernel may pin for sums; the rest hold operands
//     static constexpr int pinned     registers it may pin for operands, when sums of its own take three more
//     static constexpr int panel      registers it may pin for sums that share operands: three or four hold those
//     zero() set1(x)
//     load(p) store(p, v)             p aligned to the register
//     loadu(p) storeu(p, v)           any p
//     store_past(p, v)                as store, past the caches where the hardware can; other threads see it after
//     fence()
//     load_partial(p, n)              lanes >= n are zero; memory past n is not touched; 0 <= n <= lanes
//     store_partial(p, v, n)
//     add sub mul div max min sqrt
//     fma(a, b, c) = a * b + c        one rounding where the hardware has it
//     loadu_bf16(p) storeu_bf16(p, v)   float only: upper halves of floats, rounded to nearest even; NaN stays NaN
//     loadu_f32(p) storeu_f32(p, v)   double only: as many floats, widened exactly and rounded to nearest even
//     select_gt0(a, b)                b where a > 0, else 0 (NaN in a gives 0): the gradient of ReLU
//     where_gt0(a, b, c)              b where a > 0, else c (NaN in a gives c)
//     pow2(n)                         2^n for integers n for which that is a normal number
//     reduce_add(v)                   fixed order: halves are folded, so the same bits every time
//     transpose(r)                    a square of lanes registers, in place
//     fold(a, b)                      half of the way from two vectors to the sums of their lanes,
//     add_folded(s, ab, cd)           and the rest, for four: s[0..3] += lanes of a, b, c, d; in a fixed order
//
// and the macro FEDPAI_UNROLL, put before a loop over registers whose bound is a compile-time constant.
//
// Nothing here may be a non-inline function or a std:: template: the linker would be free to keep the copy that was
// compiled for a larger instruction set, and older CPUs would crash in it.
#pragma once

#include <cstdint>

#define FEDPAI_INLINE inline __attribute__((always_inline))
