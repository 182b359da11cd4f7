// SPDX-License-Identifier: Apache-2.0
// The CUDA batch norm on the CPU: the functions that a GPU's threads run, lane by lane, in the order of the launches of
// csrc/cuda/norm/launch.h, over the rows of the CPU's kernels and against the same formulas in float64.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_elements.h"
#include "cuda_host_norm.h"
#include "norm_reference.h"

using namespace fedpai;
using namespace fedpai::tests;
using namespace fedpai::cuda;

namespace {

template <class T>
Buffer<T> elements_of(const std::vector<double>& values) {
  Buffer<T> buffer(static_cast<std::int64_t>(values.size()));
  for (std::int64_t i = 0; i < buffer.size(); ++i) assign(buffer[i], static_cast<float>(values[static_cast<std::size_t>(i)]));
  return buffer;
}

template <class T>
Buffer<T> blank(std::int64_t size) {
  Buffer<T> buffer(size);
  for (T& element : buffer) assign(element, 1e30F);
  return buffer;
}

template <class T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
  std::int64_t i = 0;
  while (i < a.size() && as_float(a[i]) == as_float(b[i])) ++i;
  return i == a.size();
}

// What all tensors of one case are made of: multiples of 1/64 that both types hold exactly, the bias between them, so that
// rounding puts no element on the other side of a threshold.
struct Numbers {
  Numbers(std::int64_t channels, std::int64_t row) {
    Random random(static_cast<std::uint64_t>(row * 8 + channels));
    const auto draw = [&random](std::int64_t size) {
      std::vector<double> values(static_cast<std::size_t>(size));
      for (double& value : values) value = random.integer(128) / 64.0;
      return values;
    };
    x = draw(channels * row), dy = draw(channels * row), r = draw(channels * row);
    weight = draw(channels), bias = draw(channels), mean = draw(channels);
    var.assign(static_cast<std::size_t>(channels), 1.5);
    for (double& b : bias) b = static_cast<double>(static_cast<float>(b + 0.0123));
  }
  std::vector<double> x, dy, r, weight, bias, mean, var;
};

template <class T>
class Case {
 public:
  Case(const NormRows& rows, const Numbers& numbers, bool residual, Activation activation, bool train)
      : n_(numbers), channels_(rows.channels), row_(rows.row), residual_(residual), train_(train), activation_(activation),
        norm_{rows.channels, rows.row, sizeof(T) == 2 ? FEDPAI_CUDA_BF16 : FEDPAI_CUDA_F32, activation.kind, activation.slope},
        x_(elements_of<T>(numbers.x)), dy_(elements_of<T>(numbers.dy)), r_(elements_of<T>(numbers.r)),
        weight_(elements_of<float>(numbers.weight)), bias_(elements_of<float>(numbers.bias)), mean_(elements_of<float>(numbers.mean)),
        var_(elements_of<float>(numbers.var)), partial_(rows.channels * blocks_of_row(rows.row)) {}

  // As on a GPU of so many SMs.
  struct Results {
    Results(std::int64_t channels, std::int64_t row)
        : y(blank<T>(channels * row)), dx(blank<T>(channels * row)), dr(blank<T>(channels * row)), stats(3 * channels),
          running_mean(channels), running_var(channels), dweight(channels), dbias(channels) {}
    Buffer<T> y, dx, dr;
    Buffer<float> stats, running_mean, running_var, dweight, dbias;
  };

  Results run(int sms) {
    Results all(channels_, row_);
    const HostDevice device{sms};
    for (std::int64_t c = 0; c < channels_; ++c) all.running_mean[c] = 1.0F, all.running_var[c] = 2.0F;
    const T* const r = residual_ ? r_.data() : nullptr;
    const int forward =
        train_ ? norm_train(device, norm_, x_.data(), r, weight_.data(), bias_.data(), kEps, all.running_mean.data(),
                            all.running_var.data(), kMomentum, all.y.data(), all.stats.data(), partial_.data(), bytes())
               : norm_eval(device, norm_, x_.data(), r, weight_.data(), bias_.data(), mean_.data(), var_.data(), kEps, all.y.data(),
                           all.stats.data());
    CHECK(forward == FEDPAI_CUDA_OK, "forward");
    backward(device, all, dy_.data(), all.dx.data(), keeps_z() ? all.dr.data() : nullptr, all.dweight.data(), all.dbias.data());
    check_left_out(device, all);
    return all;
  }

  void check_results(const Results& got) const {
    std::vector<double> sides;
    for (std::int64_t i = 0; i < channels_ * row_; ++i) sides.push_back(static_cast<double>(as_float(got.y[i])));
    const bool from_z = keeps_z() && !activation_.is_smooth();
    const auto count = static_cast<double>(row_);
    for (std::int64_t c = 0; c < channels_; ++c) {
      const auto at = static_cast<std::size_t>(c), first = static_cast<std::size_t>(c * row_);
      const Channel expected = expected_channel(
          n_.x.data() + first, residual_ ? n_.r.data() + first : nullptr, n_.dy.data() + first, row_, n_.weight[at], n_.bias[at],
          activation_, train_ ? nullptr : &n_.mean[at], &n_.var[at], from_z ? sides.data() + first : nullptr);
      const std::string where = " of channel " + std::to_string(c);
      const float mean = got.stats[c], invstd = got.stats[channels_ + c];
      expect_near("mean" + where, mean, expected.mean, 4);
      expect_near("invstd" + where, invstd, expected.invstd, expected.invstd * 4);
      if (train_ && row_ > 1) {
        expect_near("var" + where, got.stats[2 * channels_ + c], expected.var, 4);
        expect_near("running mean" + where, got.running_mean[c], 1 + kMomentum * (expected.mean - 1), 4);
        expect_near("running var" + where, got.running_var[c], 2 + kMomentum * (expected.var - 2), 4);
      }
      // Of a smooth activation, g, below 2.3, is rounded to the activations' type before it is summed; the others' are exact.
      const double g_step = activation_.is_smooth() ? 3 * step() : 0;
      const double scale = expected.invstd * 4;
      near("dweight" + where, got.dweight[c], expected.dweight, count * expected.invstd, 2 * g_step);  // |x - mean| < 4, half of it on average
      near("dbias" + where, got.dbias[c], expected.dbias, count, g_step);
      for (std::int64_t i = 0; i < row_; ++i) {
        const auto j = static_cast<std::size_t>(i);
        const std::int64_t element = c * row_ + i;
        near("y" + where, as_float(got.y[element]), expected.y[j], 2 + 2 * scale, step());
        near("dx" + where, as_float(got.dx[element]), expected.dx[j], 2 * scale * scale, 2 * step());
        if (keeps_z()) near("dr" + where, as_float(got.dr[element]), expected.g[j], 2 + 2 * scale, step());
      }
    }
  }

 private:
  static constexpr double kMomentum = 0.1;

  bool keeps_z() const { return residual_ && activation_.kind != kNone; }
  std::int64_t bytes() const { return partial_.size() * static_cast<std::int64_t>(sizeof(BlockSums)); }
  // What rounding to the activations' type may take, of 1.
  static double step() { return sizeof(T) == 2 ? 0x1p-9 : 0; }

  static void near(const std::string& what, float got, double expected, double magnitude, double of_magnitude) {
    const double allowed = 16 * static_cast<double>(std::numeric_limits<float>::epsilon()) * (magnitude + std::abs(expected)) +
                           of_magnitude * (magnitude + 2 * std::abs(expected));
    CHECK(std::abs(static_cast<double>(got) - expected) <= allowed,
          what + " is " + std::to_string(got) + ", expected " + std::to_string(expected));
  }

  void backward(const HostDevice& device, const Results& forward, const T* dy, T* dx, T* dr, float* dweight, float* dbias) {
    const T* const z = !keeps_z() ? nullptr : activation_.is_smooth() ? r_.data() : forward.y.data();
    const int code = norm_backward(device, norm_, dy, x_.data(), z, weight_.data(), bias_.data(), forward.stats.data(), train_, dx, dr,
                                   dweight, dbias, partial_.data(), bytes());
    CHECK(code == FEDPAI_CUDA_OK, "backward");
  }

  // What is left out changes no bit of the rest; nor does a dx that is dy; nor does the norm alone, from what was kept.
  void check_left_out(const HostDevice& device, const Results& all) {
    Buffer<T> alone = blank<T>(channels_ * row_);
    backward(device, all, dy_.data(), alone.data(), nullptr, nullptr, nullptr);
    CHECK(same_bits(alone, all.dx), "dx alone");
    Buffer<T> in_place = elements_of<T>(n_.dy);
    backward(device, all, in_place.data(), in_place.data(), nullptr, nullptr, nullptr);
    CHECK(same_bits(in_place, all.dx), "dx in place");
    Buffer<float> dweight(channels_), dbias(channels_);
    backward(device, all, dy_.data(), nullptr, nullptr, dweight.data(), dbias.data());
    CHECK(same_bits(dweight, all.dweight) && same_bits(dbias, all.dbias), "dweight and dbias alone");
    if (keeps_z()) {
      Buffer<T> dr = blank<T>(channels_ * row_);
      backward(device, all, dy_.data(), nullptr, dr.data(), nullptr, nullptr);
      CHECK(same_bits(dr, all.dr), "dr alone");
    }
    if (residual_) return;
    Buffer<T> y = blank<T>(channels_ * row_);
    CHECK(norm_apply(device, norm_, x_.data(), weight_.data(), bias_.data(), all.stats.data(), y.data()) == FEDPAI_CUDA_OK, "apply");
    CHECK(same_bits(y, all.y), "y from kept statistics");
    if (row_ == 1) return;
    Buffer<float> stats(3 * channels_);
    const int code = train_ ? norm_train(device, norm_, x_.data(), nullptr, nullptr, nullptr, kEps, nullptr, nullptr, 0, nullptr,
                                         stats.data(), partial_.data(), bytes())
                            : norm_eval(device, norm_, nullptr, nullptr, nullptr, nullptr, mean_.data(), var_.data(), kEps, nullptr,
                                        stats.data());
    CHECK(code == FEDPAI_CUDA_OK, "statistics");
    for (std::int64_t i = 0; i < (train_ ? 3 : 2) * channels_; ++i) CHECK(stats[i] == all.stats[i], "statistics alone");
  }

  const Numbers& n_;
  std::int64_t channels_, row_;
  bool residual_, train_;
  Activation activation_;
  FedpaiNorm norm_;
  Buffer<T> x_, dy_, r_;
  Buffer<float> weight_, bias_, mean_, var_;
  Buffer<BlockSums> partial_;
};

template <class T>
void check_norm(const NormRows& rows, const Numbers& numbers, bool residual, Activation activation, bool train) {
  begin_case(std::to_string(rows.channels) + "x" + std::to_string(rows.row) + (residual ? " residual" : "") +
             " activation=" + std::to_string(activation.kind) + (train ? " train" : " eval") + (sizeof(T) == 4 ? " f32" : " bf16"));
  Case<T> of_rows(rows, numbers, residual, activation, train);
  const auto whole = of_rows.run(1);
  of_rows.check_results(whole);
  if (cut_rows(rows.channels, rows.row, 1000).whole_rows) return;
  const auto cut = of_rows.run(1000);
  CHECK(same_bits(cut.y, whole.y) && same_bits(cut.dx, whole.dx) && same_bits(cut.dr, whole.dr), "rows in pieces");
  CHECK(same_bits(cut.dweight, whole.dweight) && same_bits(cut.dbias, whole.dbias), "sums of pieces");
  CHECK(same_bits(cut.running_mean, whole.running_mean) && same_bits(cut.running_var, whole.running_var), "statistics of pieces");
}

// Of smooth activations, also far in the tail where most formulas lose all digits.
void check_activation(ActivationKind kind) {
  begin_case("activation " + std::to_string(kind));
  const Activation activation{kind, 0.25};
  const auto apply = [&](float x) {
    switch (kind) {
      case kSilu: return activated<kSilu>(x, 0);
      case kGelu: return activated<kGelu>(x, 0);
      default: return activated<kGeluTanh>(x, 0);
    }
  };
  const auto pull = [&](float x) {
    switch (kind) {
      case kSilu: return pulled<kSilu>(x, 1, 0);
      case kGelu: return pulled<kGelu>(x, 1, 0);
      default: return pulled<kGeluTanh>(x, 1, 0);
    }
  };
  constexpr double epsilon = std::numeric_limits<float>::epsilon();
  for (int i = -12 * 64; i <= 12 * 64; ++i) {
    const float x = static_cast<float>(i) / 64.0F + 0.003F;
    const auto wide = static_cast<double>(x);
    const auto [exact, slope] = expected_activation(activation, wide);
    // As docs/numerics.md has it: the reference's own tanh form cancels in the tail.
    const double argument = kind == kGeluTanh && i < 0 ? -1.6 * wide - 0.07 * wide * wide * wide : 0;
    if (kind == kGeluTanh && x < -3) continue;
    CHECK(std::abs(static_cast<double>(apply(x)) - exact) <= (8 + 2.5 * argument) * epsilon * std::abs(exact) + 1e-38,
          "at " + std::to_string(x) + ": " + std::to_string(apply(x)) + ", expected " + std::to_string(exact));
    CHECK(std::abs(static_cast<double>(pull(x)) - slope) <= 4 * epsilon, "derivative at " + std::to_string(x));
  }
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(apply(infinity) == infinity && std::isnan(apply(-infinity)) && std::isnan(apply(nan)), "infinities and NaN");
}

}  // namespace

FEDPAI_SUITE(cuda_host_norm) {
  for (const NormRows& rows : norm_rows()) {
    const Numbers numbers(rows.channels, rows.row);
    for (int kind = kNone; kind < kActivationKinds; ++kind) {
      const Activation activation{static_cast<ActivationKind>(kind), kind == kLeakyRelu ? 0.25 : 0.0};
      for (const bool train : {true, false}) {
        for (const bool residual : {true, false}) {
          check_norm<float>(rows, numbers, residual, activation, train);
          check_norm<BFloat16>(rows, numbers, residual, activation, train);
        }
      }
    }
  }
  for (const ActivationKind kind : {kSilu, kGelu, kGeluTanh}) check_activation(kind);

  begin_case("a mean far from zero does not cancel");
  Buffer<float> x(3 * 4096), stats(9);
  Buffer<BlockSums> partial(12);
  Random random(7);
  std::vector<double> exact(3);
  for (std::int64_t c = 0; c < 3; ++c) {
    double mean = 0, m2 = 0;
    for (std::int64_t i = 0; i < 4096; ++i) {
      x[c * 4096 + i] = static_cast<float>(1e4 + random.uniform());
      mean += static_cast<double>(x[c * 4096 + i]) / 4096;
    }
    for (std::int64_t i = 0; i < 4096; ++i) m2 += std::pow(static_cast<double>(x[c * 4096 + i]) - mean, 2);
    exact[static_cast<std::size_t>(c)] = m2 / 4095;
  }
  const FedpaiNorm norm{3, 4096, FEDPAI_CUDA_F32, kNone, 0};
  const auto statistics = [&](const FedpaiNorm& n, void* workspace, std::int64_t bytes) {
    return norm_train(HostDevice{1}, n, x.data(), nullptr, nullptr, nullptr, kEps, nullptr, nullptr, 0, nullptr, stats.data(), workspace, bytes);
  };
  CHECK(statistics(norm, partial.data(), workspace_bytes_of(norm)) == FEDPAI_CUDA_OK, "");
  for (std::int64_t c = 0; c < 3; ++c) {
    const double var = exact[static_cast<std::size_t>(c)];
    CHECK(std::abs(static_cast<double>(stats[6 + c]) - var) < 1e-6 * var, "variance of channel " + std::to_string(c));
  }

  begin_case("what cannot be is refused");
  const auto refused = [&](const auto& change) {
    FedpaiNorm n = norm;
    change(n);
    return check_norm(n);
  };
  CHECK(refused([](FedpaiNorm&) {}) == FEDPAI_CUDA_OK, "");
  CHECK(refused([](FedpaiNorm& n) { n.dtype = 2; }) == FEDPAI_CUDA_BAD_ARGUMENT, "dtype");
  CHECK(refused([](FedpaiNorm& n) { n.activation = kActivationKinds; }) == FEDPAI_CUDA_BAD_ARGUMENT, "activation");
  CHECK(refused([](FedpaiNorm& n) { n.slope = -1; }) == FEDPAI_CUDA_BAD_ARGUMENT, "slope");
  CHECK(refused([](FedpaiNorm& n) { n.row = 0; }) == FEDPAI_CUDA_BAD_ARGUMENT, "row");
  CHECK(refused([](FedpaiNorm& n) { n.channels = std::int64_t{1} << 31; }) == FEDPAI_CUDA_TOO_LARGE, "channels");
  CHECK(refused([](FedpaiNorm& n) { n.row = std::int64_t{1} << 41; }) == FEDPAI_CUDA_TOO_LARGE, "blocks of rows");
  CHECK(statistics(norm, partial.data(), workspace_bytes_of(norm) - 1) == FEDPAI_CUDA_WORKSPACE, "too little workspace");
  CHECK(statistics(norm, reinterpret_cast<char*>(partial.data()) + 8, workspace_bytes_of(norm)) == FEDPAI_CUDA_MISALIGNED, "workspace");
}
