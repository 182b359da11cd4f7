// SPDX-License-Identifier: Apache-2.0
// Group norm, forward and backward, against its formulas in float64; strips and groups of every kind of size.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/norm/group_norm.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

constexpr double kEps = 1e-5;

struct Expected {
  std::vector<double> y, dx, mean, invstd, dweight, dbias;
};

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

Expected expected_of(const GroupNormShape& s, const std::vector<double>& x, const std::vector<double>& dy,
                     const std::vector<double>& weight, const std::vector<double>& bias, bool relu) {
  const std::int64_t rows = s.channels / s.groups * s.pixels;
  const auto count = static_cast<double>(rows);
  Expected e;
  e.y = e.dx = std::vector<double>(x.size());
  e.dweight = e.dbias = std::vector<double>(weight.size());
  for (std::int64_t group = 0; group < s.groups; ++group) {
    for (std::int64_t image = 0; image < s.images; ++image) {
      const auto at = [&](std::int64_t row) { return index((group * rows + row) * s.images + image); };
      const auto channel = [&](std::int64_t row) { return index((group * rows + row) / s.pixels); };
      double mean = 0, m2 = 0, g_sum = 0, g_normal = 0;
      for (std::int64_t r = 0; r < rows; ++r) mean += x[at(r)] / count;
      for (std::int64_t r = 0; r < rows; ++r) m2 += (x[at(r)] - mean) * (x[at(r)] - mean);
      const double invstd = 1 / std::sqrt(m2 / count + kEps);
      std::vector<double> normal, weighted;
      for (std::int64_t r = 0; r < rows; ++r) {
        normal.push_back((x[at(r)] - mean) * invstd);
        const double y = normal.back() * weight[channel(r)] + bias[channel(r)];
        const double g = relu && y <= 0 ? 0 : dy[at(r)];
        e.y[at(r)] = relu && y < 0 ? 0 : y;
        e.dweight[channel(r)] += g * normal.back();
        e.dbias[channel(r)] += g;
        weighted.push_back(g * weight[channel(r)]);
        g_sum += weighted.back() / count;
        g_normal += weighted.back() * normal.back() / count;
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        e.dx[at(r)] = (weighted[index(r)] - g_sum - normal[index(r)] * g_normal) * invstd;
      }
      e.mean.push_back(mean);
      e.invstd.push_back(invstd);
    }
  }
  return e;
}

// `magnitude`: of what was added up on the way to `expected`.
template <class T>
void expect_near(const char* what, T got, double expected, double magnitude) {
  const double allowed = 16 * static_cast<double>(std::numeric_limits<T>::epsilon()) * (magnitude + std::abs(expected));
  CHECK(std::abs(static_cast<double>(got) - expected) <= allowed,
        std::string(what) + " is " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <class T>
Buffer<T> rounded(const std::vector<double>& values) {
  Buffer<T> buffer(static_cast<std::int64_t>(values.size()));
  for (std::int64_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<T>(values[index(i)]);
  return buffer;
}

template <class T>
void check_group_norm(GroupNormShape s, bool relu, int threads) {
  begin_case(std::to_string(s.images) + " images, " + std::to_string(s.channels) + " channels of " +
             std::to_string(s.pixels) + " pixels, " + std::to_string(s.groups) + " groups" + (relu ? " relu" : "") +
             (sizeof(T) == 4 ? " f32" : " f64") + " threads=" + std::to_string(threads));
  Random random(static_cast<std::uint64_t>(s.images * 64 + s.pixels * 8 + s.channels));
  // Multiples of 1/64, exact in both types, so that reference and kernel see the same numbers; the bias lies between
  // them, so that rounding cannot put an element on the other side of the ReLU.
  const auto draw = [&random](std::int64_t size) {
    std::vector<double> values(index(size));
    for (double& value : values) value = random.integer(128) / 64.0;
    return values;
  };
  const std::int64_t size = s.images * s.channels * s.pixels, statistics = s.groups * s.images;
  const std::vector<double> x_values = draw(size), dy_values = draw(size), weight_values = draw(s.channels);
  std::vector<double> bias_values = draw(s.channels);
  for (double& bias : bias_values) bias = static_cast<double>(static_cast<T>(bias + 0.0123));
  const Expected e = expected_of(s, x_values, dy_values, weight_values, bias_values, relu);

  const Buffer<T> x = rounded<T>(x_values), dy = rounded<T>(dy_values);
  const Buffer<T> weight = rounded<T>(weight_values), bias = rounded<T>(bias_values);
  Buffer<T> y(size), dx(size), mean(statistics), invstd(statistics), dweight(s.channels), dbias(s.channels);
  group_norm_forward<T>(s, x.data(), weight.data(), bias.data(), kEps, relu, y.data(), mean.data(), invstd.data(),
                        threads);
  const auto backward = [&](T* to_dx, T* to_dweight, T* to_dbias, int on) {
    group_norm_backward<T>(s, dy.data(), x.data(), weight.data(), bias.data(), mean.data(), invstd.data(), relu, to_dx,
                           to_dweight, to_dbias, on);
  };
  backward(dx.data(), dweight.data(), dbias.data(), threads);

  for (std::int64_t i = 0; i < statistics; ++i) {
    expect_near("mean", mean[i], e.mean[index(i)], 4);
    // A variance of next to nothing is as far off as the square of the mean's rounding.
    expect_near("invstd", invstd[i], e.invstd[index(i)], e.invstd[index(i)] * 4);
  }
  const std::int64_t group_rows = s.channels / s.groups * s.pixels;
  for (std::int64_t i = 0; i < size; ++i) {
    const double scale = 4 * e.invstd[index(i / (group_rows * s.images) * s.images + i % s.images)];
    expect_near("y", y[i], e.y[index(i)], 2 + 2 * scale);
    expect_near("dx", dx[i], e.dx[index(i)], 2 * scale * scale);
  }
  double largest = 1;
  for (const double inv : e.invstd) largest = std::max(largest, inv);
  for (std::int64_t i = 0; i < s.channels; ++i) {
    const auto count = static_cast<double>(s.pixels * s.images);
    expect_near("dweight", dweight[i], e.dweight[index(i)], count * largest);
    expect_near("dbias", dbias[i], e.dbias[index(i)], count);
  }

  // What is left out changes no bit of the rest, and neither does the number of threads.
  Buffer<T> dx_alone(size), dweight_alone(s.channels), dbias_alone(s.channels), y_alone(size);
  backward(dx_alone.data(), nullptr, nullptr, 1);
  backward(nullptr, dweight_alone.data(), dbias_alone.data(), 1);
  group_norm_forward<T>(s, x.data(), weight.data(), bias.data(), kEps, relu, y_alone.data(), mean.data(),
                        invstd.data(), 1);
  for (std::int64_t i = 0; i < size; ++i) CHECK(dx_alone[i] == dx[i] && y_alone[i] == y[i], "alone");
  for (std::int64_t i = 0; i < s.channels; ++i) {
    CHECK(dweight_alone[i] == dweight[i] && dbias_alone[i] == dbias[i], "dweight and dbias alone");
  }
}

void check_shape(GroupNormShape shape, int threads) {
  for (const bool relu : {false, true}) {
    check_group_norm<float>(shape, relu, threads);
    check_group_norm<double>(shape, relu, threads);
  }
}

}  // namespace

FEDPAI_SUITE(group_norm) {
  // Every width of a strip, and images that need several strips.
  for (std::int64_t images = 1; images <= 70; ++images) check_shape({images, 6, 5, 3}, 1);
  for (const std::int64_t images : {127, 128, 131}) check_shape({images, 2, 3, 1}, 2);
  // Blocks and pieces of rows: shorter, equal and longer; several channels in a piece, several pieces in a channel.
  for (const std::int64_t pixels : {1, 2, 63, 64, 65, 511, 512, 513, 1100}) {
    check_shape({3, 4, pixels, 2}, 2);
    check_shape({17, 3, pixels, 1}, 3);
  }
  check_shape({33, 700, 1, 1}, 2);
  check_shape({5, 700, 1, 700}, 2);
  // Threads that share units, and units enough for all.
  check_shape({40, 6, 400, 1}, 2);
  check_shape({40, 6, 400, 1}, 3);
  check_shape({40, 16, 90, 16}, 2);
}
