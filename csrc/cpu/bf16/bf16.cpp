// SPDX-License-Identifier: Apache-2.0
#include "cpu/bf16/bf16.h"

#include "cpu/dispatch.h"
#include "cpu/shares.h"

namespace fedpai {
namespace {

// Elements that one more thread must have to do before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;

}  // namespace

void round_to_bf16(const float* x, Bf16* y, std::int64_t n, int threads) {
  const auto round = kernels().bf16.round;
  for_shares(n, kElementsPerThread, threads,
             [&](std::int64_t begin, std::int64_t size) { round(x + begin, y + begin, size); });
}

void widen_bf16(const Bf16* x, float* y, std::int64_t n, int threads) {
  const auto widen = kernels().bf16.widen;
  for_shares(n, kElementsPerThread, threads,
             [&](std::int64_t begin, std::int64_t size) { widen(x + begin, y + begin, size); });
}

}  // namespace fedpai
