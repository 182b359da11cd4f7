// SPDX-License-Identifier: Apache-2.0
// Rounding to bfloat16 against the two nearest of its numbers, and widening; runs shorter and longer than every vector.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/bf16/bf16.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

float float_from(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Of the two bfloat16 numbers around x the nearer one, of equally near ones that with the even last bit. What comes
// after the largest finite number counts as 2^128, and stands for infinity.
Bf16 expected_of(float x) {
  const auto toward_zero = static_cast<Bf16>(bits_of(x) >> 16);
  if (std::isinf(x)) return toward_zero;
  const auto away = static_cast<Bf16>(toward_zero + 1);
  const auto value_of = [](Bf16 y) {
    const float wide = float_from(static_cast<std::uint32_t>(y) << 16);
    return std::isinf(wide) ? 0x1p128 : std::abs(static_cast<double>(wide));
  };
  const double size = std::abs(static_cast<double>(x));
  const double below = size - value_of(toward_zero), above = value_of(away) - size;
  if (below != above) return below < above ? toward_zero : away;
  return toward_zero % 2 == 0 ? toward_zero : away;
}

void check_round(const std::vector<float>& values, int threads) {
  begin_case(std::to_string(values.size()) + " values, threads=" + std::to_string(threads));
  const auto n = static_cast<std::int64_t>(values.size());
  Buffer<float> x(n), wide(n);
  Buffer<Bf16> y(n);
  for (std::int64_t i = 0; i < n; ++i) x[i] = values[static_cast<std::size_t>(i)];
  round_to_bf16(x.data(), y.data(), n, threads);
  widen_bf16(y.data(), wide.data(), n, threads);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::string what = "bits " + std::to_string(bits_of(x[i])) + " at " + std::to_string(i);
    CHECK(bits_of(wide[i]) == static_cast<std::uint32_t>(y[i]) << 16, what);
    if (std::isnan(x[i])) {
      CHECK(std::isnan(wide[i]) && std::signbit(wide[i]) == std::signbit(x[i]), what);
    } else {
      CHECK(y[i] == expected_of(x[i]), what);
    }
  }
}

}  // namespace

FEDPAI_SUITE(bf16) {
  // Every upper half, infinities, subnormals and NaN among them, with the lower halves at which something changes.
  std::vector<float> edges;
  for (std::uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      edges.push_back(float_from(upper << 16 | lower));
    }
  }
  check_round(edges, 1);
  check_round(edges, 3);

  Random random(3);
  for (std::size_t n = 0; n <= 70; ++n) {
    std::vector<float> values(n);
    for (float& value : values) value = float_from(static_cast<std::uint32_t>(random.next()));
    check_round(values, 2);
  }
  for (const std::size_t n : {32767, 32768, 49999}) {
    std::vector<float> values(n);
    for (float& value : values) value = static_cast<float>(random.uniform() - 0.5);
    check_round(values, 2);
    check_round(values, 3);
  }
}
