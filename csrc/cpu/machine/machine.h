// SPDX-License-Identifier: Apache-2.0
// The rates that a roofline is made of, measured: float32, on the instruction set in use.
//
// Each thread works on memory of its own, all of them at the same time. A rate is that of the best of many
// short windows of time: other work on the machine only ever slows one down. All throw std::invalid_argument for threads < 1, bytes < 0
// or seconds that are not above 0.
#pragma once

#include <cstdint>

namespace fedpai {

// Multiply-adds per second, of elements, by all threads together. bytes: of a buffer per thread from which one operand
// of each is loaded, rounded up to what the loop needs; 0: both operands are registers.
double fma_rate(std::int64_t bytes, int threads, double seconds);

// Bytes per second that dest = factor * source moves. bytes: of all threads' sources and dests together, rounded up.
// Three are counted per element's byte: source read, dest read before it is written (a store of part of a line makes
// the cache fetch it), dest written.
double stream_rate(std::int64_t bytes, int threads, double seconds);

// Vector loads per vector FMA of the convolutions' inner loops at their largest tile: (A + 2) / A with A sums in
// registers (a broadcast and an index per non-zero), for the weight gradient (P + 1) / P with P pinned operands.
struct LoadsPerFma {
  double forward;  // and input gradient
  double weight_grad;
};
LoadsPerFma loads_per_fma();

}  // namespace fedpai
