// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides to merge what clients send. See kernels-inl.h for the formulas.
#pragma once

#include <cstdint>

namespace fedpai {

// What client k says about some elements of the merged vector, and about no other.
struct MaskedVector {
  const float* values;     // `count` of them
  const std::int32_t* at;  // which element each value belongs to: ascending and without repeats
  std::int64_t count;
  double weight;
};

enum class ServerStep { kAvgM, kAdam, kYogi };

struct ServerStepFactors {
  float lr;
  float beta1;
  float pull1;  // 1 - beta1
  float beta2;
  float pull2;  // 1 - beta2
  float tau;
};

// Pointers need no alignment beyond their types'. Outputs are overwritten and overlap nothing, except where said.
struct AggregateKernels {
  // Elements begin to begin + n of the weighted mean of vectors; out points to element 0.
  void (*mean)(const float* const* vectors, const double* weights, std::int64_t clients, std::int64_t begin,
               std::int64_t n, bool compensated, float* out);

  // The same where client k speaks about some elements only. What nobody speaks about is taken from old.
  // cursor: for each client the number of its first value at or behind element `begin`; left behind the share.
  // Returns -1, or a client whose positions, in this share, are not ascending; out is undefined then.
  std::int64_t (*masked_mean)(const MaskedVector* vectors, std::int64_t clients, const float* old, std::int64_t begin,
                              std::int64_t n, bool compensated, std::int64_t* cursor, float* out);

  // Bytes begin to begin + n of a bitmap that has each bit set which at least `threshold` of the bitmaps have set.
  void (*majority)(const std::uint8_t* const* bitmaps, std::int64_t clients, std::int64_t threshold,
                   std::int64_t begin, std::int64_t n, std::uint8_t* out);

  // One step of n elements; m and v are read and written in place. v: null with kAvgM. out may be old or merged.
  void (*step)(ServerStep rule, const float* old, const float* merged, float* m, float* v, std::int64_t n,
               const ServerStepFactors& factors, float* out);
};

}  // namespace fedpai
