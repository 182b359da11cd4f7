// SPDX-License-Identifier: Apache-2.0
#include "cpu/aggregate/aggregate.h"

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "cpu/dispatch.h"
#include "cpu/shares.h"

namespace fedpai {
namespace {

// Values, of all clients together, that one more thread must have to add before waking it pays.
constexpr std::int64_t kValuesPerThread = 16384;

std::int64_t least_of(std::int64_t values_per_element) {
  return std::max<std::int64_t>(1, kValuesPerThread / std::max<std::int64_t>(1, values_per_element));
}

// The number of the first value of a vector at or behind an element.
std::int64_t first_from(const MaskedVector& vector, std::int64_t element, std::int64_t elements) {
  if (element == 0) return 0;
  if (element >= elements) return vector.count;
  const std::int32_t* const end = vector.at + vector.count;
  return std::lower_bound(vector.at, end, static_cast<std::int32_t>(element)) - vector.at;
}

}  // namespace

void weighted_mean(const std::vector<const float*>& vectors, const std::vector<double>& weights, std::int64_t n,
                   bool compensated, float* out, int threads) {
  const auto mean = kernels().aggregate.mean;
  const auto clients = static_cast<std::int64_t>(vectors.size());
  for_shares(n, least_of(clients), threads, [&](std::int64_t begin, std::int64_t size) {
    mean(vectors.data(), weights.data(), clients, begin, size, compensated, out);
  });
}

std::int64_t masked_mean(const std::vector<MaskedVector>& vectors, const float* old, std::int64_t n, bool compensated,
                         float* out, int threads) {
  const auto mean = kernels().aggregate.masked_mean;
  const auto clients = static_cast<std::int64_t>(vectors.size());
  std::int64_t values = n;
  for (const MaskedVector& vector : vectors) values += vector.count;
  std::atomic<std::int64_t> wrong{-1};
  for_shares(n, least_of(n > 0 ? values / n : 0), threads, [&](std::int64_t begin, std::int64_t size) {
    std::vector<std::int64_t> cursor;
    for (const MaskedVector& vector : vectors) cursor.push_back(first_from(vector, begin, n));
    std::int64_t bad = mean(vectors.data(), clients, old, begin, size, compensated, cursor.data(), out);
    // Where every share ends at the value with which the next one begins, all values were looked at.
    for (std::int64_t k = 0; k < clients && bad < 0; ++k) {
      const auto at = static_cast<std::size_t>(k);
      if (cursor[at] != first_from(vectors[at], begin + size, n)) bad = k;
    }
    if (bad >= 0) wrong = bad;
  });
  if (n == 0) {
    for (std::int64_t k = 0; k < clients; ++k) {
      if (vectors[static_cast<std::size_t>(k)].count > 0) wrong = k;
    }
  }
  return wrong;
}

void majority(const std::vector<const std::uint8_t*>& bitmaps, std::int64_t threshold, std::int64_t bytes,
              std::uint8_t* out, int threads) {
  const auto vote = kernels().aggregate.majority;
  const auto clients = static_cast<std::int64_t>(bitmaps.size());
  for_shares(bytes, least_of(clients), threads, [&](std::int64_t begin, std::int64_t size) {
    vote(bitmaps.data(), clients, threshold, begin, size, out);
  });
}

void server_step(ServerStep rule, const float* old, const float* merged, float* m, float* v, std::int64_t n,
                 const ServerStepFactors& factors, float* out, int threads) {
  const auto step = kernels().aggregate.step;
  for_shares(n, least_of(1), threads, [&](std::int64_t begin, std::int64_t size) {
    step(rule, old + begin, merged + begin, m + begin, v == nullptr ? v : v + begin, size, factors, out + begin);
  });
}

}  // namespace fedpai
