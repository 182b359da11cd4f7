// SPDX-License-Identifier: Apache-2.0
// What a machine can do at best, as loops to be timed: what each instruction set provides.
#pragma once

#include <cstdint>

namespace fedpai {

template <class T>
struct MachineKernels {
  int lanes;         // elements per vector
  int accumulators;  // vectors that a tile may sum in (Vec::accumulators)
  int pinned;        // vectors that a tile may keep as operands (Vec::pinned)

  // `rounds` times `accumulators` vector FMAs between registers. The result is only there to be used.
  T (*fma_registers)(std::int64_t rounds);

  // As many vector FMAs as `rounds` passes over a buffer have vectors, each with an operand from it. source: aligned
  // to a vector; vectors: a multiple of `accumulators`.
  T (*fma_loads)(const T* source, std::int64_t vectors, std::int64_t rounds);

  // dest[i] = factor * source[i], with ordinary stores. Aligned to a vector; elements: a multiple of 4 vectors.
  void (*scale)(const T* source, T* dest, std::int64_t elements, T factor);
};

}  // namespace fedpai
