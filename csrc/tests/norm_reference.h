// SPDX-License-Identifier: Apache-2.0
// Batch norm by its formulas in float64, and the rows that every device's kernels get right.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/norm/activation.h"

namespace fedpai::tests {

// Rows shorter, equal and longer than every block.
struct NormRows {
  std::int64_t channels, row;
};
inline std::vector<NormRows> norm_rows() {
  std::vector<NormRows> rows;
  for (std::int64_t row = 1; row <= 70; ++row) rows.push_back({2, row});
  for (const std::int64_t row : {1023, 1024, 1025, 2081, 34000}) rows.push_back({3, row});
  rows.push_back({33, 1100});
  return rows;
}

inline constexpr double kEps = 1e-5;

struct Channel {
  double mean = 0, invstd = 0, var = 0, dweight = 0, dbias = 0;
  std::vector<double> y, g, dx;
};

// The activation at y, and its derivative.
inline std::pair<double, double> expected_activation(Activation activation, double y) {
  const double s = 1 / (1 + std::exp(-y)), below = std::erfc(-y / std::sqrt(2.0)) / 2;
  const double a = std::sqrt(2 / std::acos(-1.0)), bell = a / 2 * std::exp(-y * y / 2);
  const double th = std::tanh(a * (y + 0.044715 * y * y * y));
  switch (activation.kind) {
    case kRelu: return {y > 0 ? y : 0, y > 0 ? 1 : 0};
    case kRelu6: return {y > 0 ? std::min(y, 6.0) : 0, y > 0 && y < 6 ? 1 : 0};
    case kLeakyRelu: return {y > 0 ? y : y * activation.slope, y > 0 ? 1 : activation.slope};
    case kSilu: return {y * s, s * (1 + y * (1 - s))};
    case kGelu: return {y * below, below + y * bell};
    case kGeluTanh:
      return {y / 2 * (1 + th), (1 + th) / 2 + y / 2 * (1 - th * th) * a * (1 + 3 * 0.044715 * y * y)};
    default: return {y, 1};
  }
}

// One channel of `row` elements. A residual r is added before the activation; it and given statistics are used when
// not null. sides: null, or where the derivative of a piecewise linear activation is read: its result as it was kept.
inline Channel expected_channel(const double* x, const double* r, const double* dy, std::int64_t row, double weight,
                                double bias, Activation activation, const double* given_mean, const double* given_var,
                                const double* sides = nullptr) {
  const auto size = static_cast<std::size_t>(row);
  const auto count = static_cast<double>(row);
  Channel c;
  double m2 = 0;
  for (std::size_t i = 0; i < size; ++i) c.mean += x[i] / count;
  for (std::size_t i = 0; i < size; ++i) m2 += (x[i] - c.mean) * (x[i] - c.mean);
  c.var = m2 / (count - 1);
  c.invstd = 1 / std::sqrt(m2 / count + kEps);
  if (given_mean != nullptr) {
    c.mean = *given_mean;
    c.invstd = 1 / std::sqrt(*given_var + kEps);
  }
  std::vector<double> normal(size);
  for (std::size_t i = 0; i < size; ++i) {
    normal[i] = (x[i] - c.mean) * c.invstd;
    const double y = normal[i] * weight + bias + (r != nullptr ? r[i] : 0);
    const auto [value, derivative] = expected_activation(activation, y);
    c.y.push_back(value);
    c.g.push_back((sides != nullptr ? expected_activation(activation, sides[i]).second : derivative) * dy[i]);
    c.dbias += c.g[i];
    c.dweight += c.g[i] * normal[i];
  }
  for (std::size_t i = 0; i < size; ++i) {
    const double pull = given_mean != nullptr ? 0 : c.dbias / count + normal[i] * c.dweight / count;
    c.dx.push_back((c.g[i] - pull) * c.invstd * weight);
  }
  return c;
}

// `magnitude`: of what was added up on the way to `expected`.
template <class T>
void expect_near(const std::string& what, T got, double expected, double magnitude) {
  const double allowed = 16 * static_cast<double>(std::numeric_limits<T>::epsilon()) * (magnitude + std::abs(expected));
  CHECK(std::abs(static_cast<double>(got) - expected) <= allowed,
        what + " is " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <class T>
Buffer<T> rounded(const std::vector<double>& values) {
  Buffer<T> buffer(static_cast<std::int64_t>(values.size()));
  for (std::int64_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<T>(values[static_cast<std::size_t>(i)]);
  return buffer;
}

}  // namespace fedpai::tests
