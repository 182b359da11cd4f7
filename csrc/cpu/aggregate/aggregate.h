// SPDX-License-Identifier: Apache-2.0
// Merging what clients send, in one pass that the threads share element by element. Every element is computed by itself,
// its sums in the order of the clients: the bits depend neither on the number of threads nor on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aggregate/kernels.h"

namespace fedpai {

// out[j] = sum_k weights[k] vectors[k][j] / sum_k weights[k], j < n. At least one vector; weights above 0.
void weighted_mean(const std::vector<const float*>& vectors, const std::vector<double>& weights, std::int64_t n,
                   bool compensated, float* out, int threads);

// The same over the vectors that speak about j; old[j] where none does. Positions are checked in passing: returns -1, or a
// client whose positions are not ascending, without repeats and within [0, n); out is undefined then.
std::int64_t masked_mean(const std::vector<MaskedVector>& vectors, const float* old, std::int64_t n, bool compensated,
                         float* out, int threads);

// The bits that at least `threshold` of the bitmaps have, each of so many bytes. threshold: 1 to the number of bitmaps.
void majority(const std::vector<const std::uint8_t*>& bitmaps, std::int64_t threshold, std::int64_t bytes,
              std::uint8_t* out, int threads);

// The server's step from old towards merged; m, and v except with kAvgM, are its state. See step_kernels-inl.h.
void server_step(ServerStep rule, const float* old, const float* merged, float* m, float* v, std::int64_t n,
                 const ServerStepFactors& factors, float* out, int threads);

}  // namespace fedpai
