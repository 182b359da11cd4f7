// SPDX-License-Identifier: Apache-2.0
#include "cpu/bf16/bf16.h"

#include <algorithm>

#include "cpu/dispatch.h"

namespace fedpai {
namespace {

// Elements that one more thread must have to do before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;
// Shares begin at multiples of this: whole cache lines of either type.
constexpr std::int64_t kShareUnit = 64;

// Runs body(first element, elements) over one share for each thread.
template <class F>
void for_shares(std::int64_t n, int threads, const F& body) {
  const auto parts = std::clamp<std::int64_t>(n / kElementsPerThread, 1, std::max(threads, 1));
  const std::int64_t share = (n / parts / kShareUnit + 1) * kShareUnit;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t begin = std::min(n, part * share), end = std::min(n, begin + share);
    if (begin < end) body(begin, end - begin);
  }
}

}  // namespace

void round_to_bf16(const float* x, Bf16* y, std::int64_t n, int threads) {
  const auto round = kernels().bf16.round;
  for_shares(n, threads, [&](std::int64_t begin, std::int64_t size) { round(x + begin, y + begin, size); });
}

void widen_bf16(const Bf16* x, float* y, std::int64_t n, int threads) {
  const auto widen = kernels().bf16.widen;
  for_shares(n, threads, [&](std::int64_t begin, std::int64_t size) { widen(x + begin, y + begin, size); });
}

}  // namespace fedpai
