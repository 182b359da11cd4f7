// SPDX-License-Identifier: Apache-2.0
// Batch norm, forward and backward, against its formulas in float64; rows shorter, equal and longer than every block.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/bf16/bf16.h"
#include "cpu/norm/norm.h"
#include "norm_reference.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

template <class T>
void check_norm(std::int64_t channels, std::int64_t row, bool residual, Activation activation, bool train,
                int threads) {
  begin_case(std::to_string(channels) + "x" + std::to_string(row) + (residual ? " residual" : "") +
             " activation=" + std::to_string(activation.kind) + (train ? " train" : " eval") +
             (sizeof(T) == 4 ? " f32" : " f64") + " threads=" + std::to_string(threads));
  Random random(static_cast<std::uint64_t>(row * 8 + channels));
  // Multiples of 1/64, exact in both types, so that reference and kernel see the same numbers; the bias lies between
  // them, so that rounding cannot put an element on the other side of the ReLU.
  const auto draw = [&random](std::int64_t size) {
    std::vector<double> values(static_cast<std::size_t>(size));
    for (double& value : values) value = random.integer(128) / 64.0;
    return values;
  };
  const std::vector<double> x_values = draw(channels * row), dy_values = draw(channels * row);
  const std::vector<double> r_values = draw(channels * row);
  std::vector<double> weight_values = draw(channels), bias_values = draw(channels), mean_values = draw(channels);
  std::vector<double> var_values(static_cast<std::size_t>(channels), 1.5);
  for (double& bias : bias_values) bias += 0.0123;

  const Buffer<T> x = rounded<T>(x_values), dy = rounded<T>(dy_values), r_buffer = rounded<T>(r_values);
  const T* const r = residual ? r_buffer.data() : nullptr;
  const Buffer<T> weight = rounded<T>(weight_values), bias = rounded<T>(bias_values);
  Buffer<T> y(channels * row), dx(channels * row), dr(channels * row);
  Buffer<T> invstd(channels), var(channels), dweight(channels), dbias(channels);
  Buffer<T> mean = rounded<T>(mean_values);
  const NormShape shape{channels, row};
  if (train) {
    batch_norm_train<T>(shape, x.data(), r, weight.data(), bias.data(), kEps, activation, y.data(), mean.data(),
                        invstd.data(), var.data(), threads);
  } else {
    const Buffer<T> given_var = rounded<T>(var_values);
    batch_norm_eval<T>(shape, x.data(), r, weight.data(), bias.data(), mean.data(), given_var.data(), kEps, activation,
                       y.data(), invstd.data(), threads);
  }
  const T* const z = residual && activation.kind != kNone ? (activation.is_smooth() ? r : y.data()) : nullptr;
  NormKept<T> kept_x{x.data()}, kept_z{z};
  const auto backward = [&](T* to_dx, T* to_dr, T* to_dweight, T* to_dbias) {
    batch_norm_backward<T>(shape, dy.data(), kept_x, kept_z, weight.data(), bias.data(), mean.data(), invstd.data(),
                           train, activation, to_dx, to_dr, to_dweight, to_dbias, threads);
  };
  backward(dx.data(), z != nullptr ? dr.data() : nullptr, dweight.data(), dbias.data());

  for (std::int64_t c = 0; c < channels; ++c) {
    const auto at = static_cast<std::size_t>(c);
    const double* const x_row = x_values.data() + c * row;
    const Channel expected =
        expected_channel(x_row, residual ? r_values.data() + c * row : nullptr, dy_values.data() + c * row, row,
                         static_cast<double>(weight[c]), static_cast<double>(bias[c]), activation,
                         train ? nullptr : &mean_values[at], &var_values[at]);
    const auto count = static_cast<double>(row);
    const std::string where = " of channel " + std::to_string(c);
    if (train) expect_near("mean" + where, mean[c], expected.mean, 4);
    expect_near("invstd" + where, invstd[c], expected.invstd, expected.invstd * 4);
    if (train && row > 1) expect_near("var" + where, var[c], expected.var, 4);
    expect_near("dweight" + where, dweight[c], expected.dweight, count * expected.invstd);
    expect_near("dbias" + where, dbias[c], expected.dbias, count);
    const double scale = expected.invstd * 4;
    for (std::int64_t i = 0; i < row; ++i) {
      expect_near("y" + where, y[c * row + i], expected.y[static_cast<std::size_t>(i)], 2 + 2 * scale);
      expect_near("dx" + where, dx[c * row + i], expected.dx[static_cast<std::size_t>(i)], 2 * scale * scale);
      if (z != nullptr) {
        const double g = expected.g[static_cast<std::size_t>(i)];
        if (activation.is_smooth()) expect_near("dr" + where, dr[c * row + i], g, 2 + 2 * scale);
        else CHECK(dr[c * row + i] == static_cast<T>(g), "dr" + where);
      }
    }
  }

  // What is left out changes no bit of the rest.
  Buffer<T> alone(channels * row), dweight_alone(channels), dbias_alone(channels);
  backward(alone.data(), nullptr, nullptr, nullptr);
  for (std::int64_t i = 0; i < channels * row; ++i) CHECK(alone[i] == dx[i], "dx alone");
  backward(nullptr, nullptr, dweight_alone.data(), dbias_alone.data());
  for (std::int64_t c = 0; c < channels; ++c) {
    CHECK(dweight_alone[c] == dweight[c] && dbias_alone[c] == dbias[c], "dweight and dbias alone");
  }
  if (z != nullptr) {
    backward(nullptr, alone.data(), nullptr, nullptr);
    for (std::int64_t i = 0; i < channels * row; ++i) CHECK(alone[i] == dr[i], "dr alone");
  }

  // Kept as bfloat16, which holds these x and r exactly, and the sides of y.
  if constexpr (std::is_same_v<T, float>) {
    Buffer<Bf16> short_x(channels * row), short_z(channels * row);
    round_to_bf16(x.data(), short_x.data(), channels * row, threads);
    if (z != nullptr && activation.is_smooth()) {
      round_to_bf16(z, short_z.data(), channels * row, threads);
    } else if (z != nullptr) {
      round_for_backward(shape, z, nullptr, nullptr, nullptr, nullptr, activation, short_z.data(), threads);
    }
    kept_x = {nullptr, short_x.data()};
    if (z != nullptr) kept_z = {nullptr, short_z.data()};
    Buffer<T> from_short(channels * row), dr_short(channels * row);
    backward(from_short.data(), z != nullptr ? dr_short.data() : nullptr, dweight_alone.data(), dbias_alone.data());
    for (std::int64_t i = 0; i < channels * row; ++i) {
      CHECK(from_short[i] == dx[i], "dx from bfloat16");
      if (z != nullptr) CHECK(dr_short[i] == dr[i], "dr from bfloat16");
    }
    for (std::int64_t c = 0; c < channels; ++c) {
      CHECK(dweight_alone[c] == dweight[c] && dbias_alone[c] == dbias[c], "dweight and dbias from bfloat16");
    }
    if (z != nullptr) {
      backward(nullptr, dr_short.data(), nullptr, nullptr);
      for (std::int64_t i = 0; i < channels * row; ++i) CHECK(dr_short[i] == dr[i], "dr alone, from bfloat16");
    }
  }
}

// Rounded copies of numbers that bfloat16 does not hold: each is a neighbour, the nearest wherever the activation's
// derivative there is that of the number, and the derivatives of all are those of the numbers.
void check_sides(std::int64_t channels, std::int64_t row, Activation activation, bool of_result, int threads) {
  begin_case("sides of " + std::to_string(channels) + "x" + std::to_string(row) + (of_result ? " z" : " x") +
             " activation=" + std::to_string(activation.kind) + " threads=" + std::to_string(threads));
  Random random(static_cast<std::uint64_t>(row * 8 + channels));
  const std::int64_t size = channels * row;
  Buffer<float> x(size), ones(size), mean(channels), scale(channels), shift(channels);
  // Densely about the thresholds: at 0 and 6 for a result, else where the map takes those.
  for (std::int64_t i = 0; i < size; ++i) {
    const float near = static_cast<float>(random.integer(4096)) / (4096.0f * 64.0f);
    x[i] = (i % 2 == 0 ? 1.0f : 7.0f) + near;
    if (of_result) x[i] -= i % 2 == 0 ? 1.0f + 1e-5f : 1.0f;
    ones[i] = 1.0f;
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    mean[c] = 1.001f;
    scale[c] = c % 2 == 0 ? 1.0f : -1.0f;
    shift[c] = c % 2 == 0 ? 0.0f : 6.001f;
  }
  Buffer<float> invstd(channels);
  for (std::int64_t c = 0; c < channels; ++c) invstd[c] = 1.0f;
  Buffer<Bf16> y(size), nearest(size);
  Buffer<float> wide(size);
  const NormShape shape{channels, row};
  const auto given = [of_result](const Buffer<float>& b) { return of_result ? nullptr : b.data(); };
  round_for_backward(shape, x.data(), given(scale), given(shift), given(mean), given(invstd), activation, y.data(),
                     threads);
  round_to_bf16(x.data(), nearest.data(), size, 1);
  widen_bf16(y.data(), wide.data(), size, 1);
  std::int64_t moved = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t c = i / row;
    const auto slope_at = [&](float value) {
      const float norm = std::fma(value - mean[c], scale[c], shift[c]);
      return expected_activation(activation, static_cast<double>(of_result ? value : norm)).second;
    };
    float rounded;
    const std::uint32_t bits = static_cast<std::uint32_t>(nearest[i]) << 16;
    std::memcpy(&rounded, &bits, sizeof rounded);
    const bool flips = slope_at(rounded) != slope_at(x[i]);
    moved += flips;
    CHECK(slope_at(wide[i]) == slope_at(x[i]), "side of " + std::to_string(x[i]));
    CHECK((y[i] == nearest[i]) != flips, "nearest of " + std::to_string(x[i]));
    const int apart = static_cast<int>(y[i]) - static_cast<int>(nearest[i]);
    CHECK(apart >= -1 && apart <= 1, "neighbour of " + std::to_string(x[i]));
  }
  if (row > 1000 && !of_result) CHECK(moved > 0, "the case has elements at a threshold");
}

template <class T>
void check_rows(std::int64_t channels, std::int64_t row, int threads) {
  for (int kind = kNone; kind < kActivationKinds; ++kind) {
    const Activation activation{static_cast<ActivationKind>(kind), kind == kLeakyRelu ? 0.25 : 0.0};
    for (const bool train : {true, false}) {
      for (const bool residual : {true, false}) check_norm<T>(channels, row, residual, activation, train, threads);
    }
  }
}

}  // namespace

FEDPAI_SUITE(norm) {
  for (const NormRows& rows : norm_rows()) {
    const int threads = rows.row <= 70 ? 1 : 2;
    check_rows<float>(rows.channels, rows.row, threads);
    check_rows<double>(rows.channels, rows.row, threads + 1);
  }
  for (const Activation activation : {Activation{kRelu}, {kRelu6}, {kLeakyRelu, 0.25}}) {
    for (const std::int64_t row : {1, 15, 16, 17, 1023, 1025, 34000}) {
      for (const bool of_result : {false, true}) check_sides(3, row, activation, of_result, 2);
    }
  }
}
