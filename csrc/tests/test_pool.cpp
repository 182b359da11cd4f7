// SPDX-License-Identifier: Apache-2.0
// Max and average pooling, forward and backward, against plain loops over their windows.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/pool/pool.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

// The window of one output position along one axis: input positions begin, begin + step, ... (those inside the image).
struct Window {
  std::vector<std::int64_t> inside;
  std::int64_t padded;  // positions in the image or its padding
};

Window window_of(const PoolSpec& spec, std::int64_t out, bool adaptive) {
  Window window{{}, 0};
  if (adaptive) {
    const std::int64_t end = ((out + 1) * spec.in + spec.out - 1) / spec.out;
    for (std::int64_t i = out * spec.in / spec.out; i < end; ++i) window.inside.push_back(i);
    window.padded = static_cast<std::int64_t>(window.inside.size());
    return window;
  }
  for (std::int64_t tap = 0; tap < spec.kernel; ++tap) {
    const std::int64_t i = out * spec.stride - spec.padding + tap * spec.dilation;
    if (i >= 0 && i < spec.in) window.inside.push_back(i);
    window.padded += i < spec.in + spec.padding;
  }
  return window;
}

enum class Kind { kMax, kAverage, kAverageWithPadding, kAdaptive };

struct Expected {
  std::vector<double> y, dx;
};

// [channel][row][column][batch], as the kernels store it.
Expected expected_of(const PoolShape& shape, Kind kind, const std::vector<double>& x, const std::vector<double>& dy) {
  const PoolSpec &rows = shape.rows, &columns = shape.columns;
  Expected expected{std::vector<double>(dy.size()), std::vector<double>(x.size())};
  const auto index = [&shape](std::int64_t height, std::int64_t width, std::int64_t c, std::int64_t h, std::int64_t w,
                              std::int64_t n) {
    return static_cast<std::size_t>(((c * height + h) * width + w) * shape.batch + n);
  };
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    for (std::int64_t p = 0; p < rows.out; ++p) {
      for (std::int64_t q = 0; q < columns.out; ++q) {
        const Window down = window_of(rows, p, kind == Kind::kAdaptive);
        const Window across = window_of(columns, q, kind == Kind::kAdaptive);
        const auto divisor = kind == Kind::kAverageWithPadding
                                 ? static_cast<double>(down.padded * across.padded)
                                 : static_cast<double>(down.inside.size() * across.inside.size());
        for (std::int64_t n = 0; n < shape.batch; ++n) {
          const std::size_t out = index(rows.out, columns.out, c, p, q, n);
          double sum = 0, largest = -std::numeric_limits<double>::infinity();
          std::size_t winner = 0;
          for (const std::int64_t h : down.inside) {
            for (const std::int64_t w : across.inside) {
              const std::size_t in = index(rows.in, columns.in, c, h, w, n);
              sum += x[in];
              if (x[in] > largest) {
                largest = x[in];
                winner = in;  // the first of equals
              }
              if (kind != Kind::kMax) expected.dx[in] += dy[out] / divisor;
            }
          }
          if (kind == Kind::kMax) expected.dx[winner] += dy[out];
          expected.y[out] = kind == Kind::kMax ? largest : sum / divisor;
        }
      }
    }
  }
  return expected;
}

template <class T>
void expect_near(const char* what, const Buffer<T>& got, const std::vector<double>& expected, bool exact) {
  const double allowed = exact ? 0 : 64 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::int64_t i = 0; i < got.size(); ++i) {
    const double value = expected[static_cast<std::size_t>(i)];
    if (std::abs(static_cast<double>(got[i]) - value) <= allowed) continue;
    CHECK(false, std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
                     std::to_string(value));
    return;
  }
  CHECK(true, "");
}

template <class T>
void check_pool(const std::string& name, const PoolShape& shape, Kind kind, int threads) {
  begin_case(name + " n=" + std::to_string(shape.batch) + (sizeof(T) == 4 ? " f32" : " f64"));
  Random random(static_cast<std::uint64_t>(shape.batch));
  const std::int64_t in_size = shape.channels * shape.rows.in * shape.columns.in * shape.batch;
  const std::int64_t out_size = shape.channels * shape.rows.out * shape.columns.out * shape.batch;
  Buffer<T> x(in_size), dy(out_size), y(out_size), dx(in_size);
  Buffer<typename PoolTap<T>::type> winners(out_size);
  std::vector<double> x_values, dy_values;
  for (T& value : x) x_values.push_back(static_cast<double>(value = static_cast<T>(random.integer(4))));
  for (T& value : dy) dy_values.push_back(static_cast<double>(value = static_cast<T>(random.integer(4))));

  switch (kind) {
    case Kind::kMax:
      max_pool2d_fwd<T>(shape, x.data(), y.data(), winners.data(), threads);
      max_pool2d_dx<T>(shape, dy.data(), winners.data(), dx.data(), threads);
      break;
    case Kind::kAverage:
    case Kind::kAverageWithPadding: {
      const PoolDivisor divisor{kind == Kind::kAverageWithPadding, 0};
      avg_pool2d_fwd<T>(shape, divisor, x.data(), y.data(), threads);
      avg_pool2d_dx<T>(shape, divisor, dy.data(), dx.data(), threads);
      break;
    }
    case Kind::kAdaptive:
      adaptive_avg_pool2d_fwd<T>(shape, x.data(), y.data(), threads);
      adaptive_avg_pool2d_dx<T>(shape, dy.data(), dx.data(), threads);
      break;
  }
  const Expected expected = expected_of(shape, kind, x_values, dy_values);
  expect_near("y", y, expected.y, kind == Kind::kMax);
  expect_near("dx", dx, expected.dx, kind == Kind::kMax);
}

void check_kinds(const std::string& name, PoolShape shape, int threads) {
  check_pool<float>("max " + name, shape, Kind::kMax, threads);
  check_pool<double>("max " + name, shape, Kind::kMax, threads);
  // Averages have no dilation.
  if (shape.rows.dilation != 1 || shape.columns.dilation != 1) return;
  check_pool<float>("avg " + name, shape, Kind::kAverage, threads);
  check_pool<double>("avg " + name, shape, Kind::kAverageWithPadding, threads);
  check_pool<float>("adaptive " + name, shape, Kind::kAdaptive, threads);
}

}  // namespace

FEDPAI_SUITE(pool) {
  // in, out, kernel, stride, padding, dilation
  for (std::int64_t batch = 1; batch <= 65; ++batch) {
    check_kinds("2x2", {2, batch, {4, 2, 2, 2, 0, 1}, {5, 2, 2, 2, 0, 1}}, 1);
  }
  for (const std::int64_t batch : {1, 7, 16, 33}) {
    check_kinds("3x3 stride 2 padding 1", {3, batch, {9, 5, 3, 2, 1, 1}, {8, 4, 3, 2, 1, 1}}, 2);
    check_kinds("overlapping", {3, batch, {6, 6, 3, 1, 1, 1}, {7, 7, 3, 1, 1, 1}}, 2);
    check_kinds("not square", {1, batch, {7, 6, 2, 1, 0, 1}, {9, 3, 3, 3, 0, 1}}, 1);
    check_kinds("rounded up", {2, batch, {7, 4, 2, 2, 0, 1}, {8, 3, 3, 3, 0, 1}}, 2);
    check_kinds("stride larger than kernel", {2, batch, {11, 4, 2, 3, 0, 1}, {9, 2, 1, 5, 0, 1}}, 1);
    check_kinds("dilated", {2, batch, {9, 5, 3, 1, 0, 2}, {8, 4, 2, 2, 1, 3}}, 2);
    check_kinds("whole image", {70, batch, {4, 1, 4, 4, 0, 1}, {4, 1, 4, 4, 0, 1}}, 2);
  }
}
