// SPDX-License-Identifier: Apache-2.0
// Cuts n elements into one share for each thread: for loops in which every element is computed by itself, so that the
// results do not depend on the cut.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fedpai {

// Shares begin at multiples of this: whole cache lines of any type, so that two threads seldom meet in one.
constexpr std::int64_t kShareUnit = 64;

// Runs body(first element, elements) over the shares. least: elements that one more thread must have to do before
// waking it pays.
template <class F>
void for_shares(std::int64_t n, std::int64_t least, int threads, const F& body) {
  const auto parts = std::clamp<std::int64_t>(n / least, 1, std::max(threads, 1));
  const std::int64_t share = (n / parts / kShareUnit + 1) * kShareUnit;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t begin = std::min(n, part * share), end = std::min(n, begin + share);
    if (begin < end) body(begin, end - begin);
  }
}

}  // namespace fedpai
