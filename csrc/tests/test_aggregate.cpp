// SPDX-License-Identifier: Apache-2.0
// Merging against its formulas in plain float64: vectors below, at and above the lengths of vectors, sweeps and blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/aggregate/aggregate.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

using Floats = std::vector<Buffer<float>>;

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

void expect_bits(const Buffer<float>& got, const std::vector<float>& expected) {
  for (std::int64_t j = 0; j < got.size(); ++j) {
    const float value = expected[static_cast<std::size_t>(j)];
    if (bits_of(got[j]) == bits_of(value)) continue;
    CHECK(false, std::to_string(j) + " is " + std::to_string(got[j]) + ", expected " + std::to_string(value));
    return;
  }
  CHECK(true, "");
}

// A mean in the order of its terms: float64 sums, or sums in extended precision where the kernel compensates.
class Mean {
 public:
  explicit Mean(bool compensated) : compensated_(compensated) {}
  void add(double weight, float value) {
    const double term = weight * static_cast<double>(value);
    sum_ += term;
    wide_ += static_cast<long double>(term);
    weight_ += weight;
  }
  float value_or(float old) const {
    if (weight_ == 0) return old;
    return static_cast<float>((compensated_ ? static_cast<double>(wide_) : sum_) / weight_);
  }

 private:
  bool compensated_;
  double sum_ = 0, weight_ = 0;
  long double wide_ = 0;
};

std::vector<double> weights_of(std::int64_t clients, Random& random) {
  std::vector<double> weights;
  for (std::int64_t k = 0; k < clients; ++k) weights.push_back(1 + std::abs(random.integer(1000)));
  return weights;
}

float value_of(Random& random) { return static_cast<float>(2 * random.uniform() - 1); }

void check_mean(std::int64_t clients, std::int64_t n, bool compensated, int threads) {
  begin_case("mean of " + std::to_string(clients) + " x " + std::to_string(n) + (compensated ? ", compensated" : ""));
  Random random(static_cast<std::uint64_t>(clients * 1000 + n));
  const std::vector<double> weights = weights_of(clients, random);
  Floats vectors;
  std::vector<const float*> pointers;
  std::vector<Mean> means(static_cast<std::size_t>(n), Mean(compensated));
  for (std::int64_t k = 0; k < clients; ++k) {
    Buffer<float>& vector = vectors.emplace_back(n);
    for (std::int64_t j = 0; j < n; ++j) {
      vector[j] = value_of(random);
      means[static_cast<std::size_t>(j)].add(weights[static_cast<std::size_t>(k)], vector[j]);
    }
    pointers.push_back(vector.data());
  }
  std::vector<float> expected;
  for (const Mean& mean : means) expected.push_back(mean.value_or(0));
  Buffer<float> out(n);
  weighted_mean(pointers, weights, n, compensated, out.data(), threads);
  expect_bits(out, expected);
}

// share: of the elements that a client speaks about.
void check_masked_mean(std::int64_t clients, std::int64_t n, double share, bool compensated, int threads) {
  begin_case("masked mean of " + std::to_string(clients) + " x " + std::to_string(n) + ", share " +
             std::to_string(share) + (compensated ? ", compensated" : ""));
  Random random(static_cast<std::uint64_t>(clients * 1000 + n));
  const std::vector<double> weights = weights_of(clients, random);
  std::vector<Mean> means(static_cast<std::size_t>(n), Mean(compensated));
  Floats values;
  std::vector<Buffer<std::int32_t>> positions;
  std::vector<MaskedVector> vectors;
  for (const double weight : weights) {
    std::vector<std::int32_t> at;
    for (std::int64_t j = 0; j < n; ++j) {
      if (random.uniform() < share) at.push_back(static_cast<std::int32_t>(j));
    }
    const auto count = static_cast<std::int64_t>(at.size());
    Buffer<float>& own = values.emplace_back(count);
    Buffer<std::int32_t>& places = positions.emplace_back(count);
    std::copy(at.begin(), at.end(), places.begin());
    for (std::int64_t i = 0; i < count; ++i) {
      own[i] = value_of(random);
      means[static_cast<std::size_t>(places[i])].add(weight, own[i]);
    }
    vectors.push_back({own.data(), places.data(), count, weight});
  }
  Buffer<float> old(n), out(n);
  std::vector<float> expected;
  for (std::int64_t j = 0; j < n; ++j) {
    old[j] = value_of(random);
    expected.push_back(means[static_cast<std::size_t>(j)].value_or(old[j]));
  }
  CHECK(masked_mean(vectors, old.data(), n, compensated, out.data(), threads) == -1, "positions are in order");
  expect_bits(out, expected);
}

// Positions that cannot be: the second client's, of three.
void check_refused(const std::vector<std::int32_t>& wrong, std::int64_t n, int threads) {
  begin_case("refused positions, n=" + std::to_string(n));
  const std::vector<float> values(std::max<std::size_t>(wrong.size(), 1), 1.0F);
  const std::vector<std::int32_t> none;
  const MaskedVector silent{values.data(), none.data(), 0, 1.0};
  const MaskedVector bad{values.data(), wrong.data(), static_cast<std::int64_t>(wrong.size()), 1.0};
  Buffer<float> old(n), out(n);
  CHECK(masked_mean({silent, bad, silent}, old.data(), n, false, out.data(), threads) == 1, "");
}

void check_majority(std::int64_t clients, std::int64_t bytes, std::int64_t threshold, int threads) {
  begin_case("majority of " + std::to_string(clients) + " x " + std::to_string(bytes) + " bytes, threshold " +
             std::to_string(threshold));
  Random random(static_cast<std::uint64_t>(clients * 1000 + bytes));
  std::vector<Buffer<std::uint8_t>> bitmaps;
  std::vector<const std::uint8_t*> pointers;
  for (std::int64_t k = 0; k < clients; ++k) {
    for (std::uint8_t& byte : bitmaps.emplace_back(bytes)) byte = static_cast<std::uint8_t>(random.next());
    pointers.push_back(bitmaps.back().data());
  }
  Buffer<std::uint8_t> out(bytes);
  majority(pointers, threshold, bytes, out.data(), threads);
  for (std::int64_t j = 0; j < bytes; ++j) {
    int expected = 0;
    for (int bit = 0; bit < 8; ++bit) {
      std::int64_t votes = 0;
      for (const auto& bitmap : bitmaps) votes += bitmap[j] >> bit & 1;
      expected |= static_cast<int>(votes >= threshold) << bit;
    }
    if (out[j] != expected) CHECK(false, "byte " + std::to_string(j));
  }
  CHECK(true, "");
}

// Step by step in float32, an operation at a time: every instruction set must give these bits.
void check_step(ServerStep rule, std::int64_t n, int threads) {
  begin_case("server step " + std::to_string(static_cast<int>(rule)) + " of " + std::to_string(n));
  const float beta1 = 0.9F, beta2 = 0.99F, lr = 0.3F, tau = 1e-3F;
  const ServerStepFactors f{lr, beta1, 1.0F - beta1, beta2, 1.0F - beta2, tau};
  Random random(static_cast<std::uint64_t>(n + 1));
  Buffer<float> x(n), merged(n), m(n), v(n), out(n);
  std::vector<float> expected_x, expected_m, expected_v;
  for (std::int64_t j = 0; j < n; ++j) {
    x[j] = value_of(random);
    merged[j] = value_of(random);
    m[j] = value_of(random);
    v[j] = std::abs(value_of(random));
    if (j % 5 == 1) v[j] = (merged[j] - x[j]) * (merged[j] - x[j]);  // where Yogi's sign is zero
    const float delta = merged[j] - x[j], square = delta * delta, change = f.pull2 * square;
    float mean = beta1 * m[j], wide = v[j], step;
    if (rule == ServerStep::kAvgM) {
      mean += delta;
      step = lr * mean;
    } else {
      mean += f.pull1 * delta;
      if (rule == ServerStep::kAdam) wide = beta2 * wide + change;
      else if (wide > square) wide -= change;
      else if (wide < square) wide += change;
      step = lr * mean / (std::sqrt(wide) + tau);
    }
    expected_x.push_back(x[j] + step);
    expected_m.push_back(mean);
    expected_v.push_back(wide);
  }
  const bool has_square = rule != ServerStep::kAvgM;
  server_step(rule, x.data(), merged.data(), m.data(), has_square ? v.data() : nullptr, n, f, out.data(), threads);
  expect_bits(out, expected_x);
  expect_bits(m, expected_m);
  expect_bits(v, expected_v);
}

}  // namespace

FEDPAI_SUITE(aggregate) {
  for (const bool compensated : {false, true}) {
    for (const std::int64_t clients : {1, 2, 3, 4, 5, 8, 11}) {
      for (std::int64_t n = 0; n <= 35; ++n) check_mean(clients, n, compensated, 1);
      for (const std::int64_t n : {1023, 1024, 1025, 2047, 2048, 2049, 5000}) check_mean(clients, n, compensated, 1);
    }
    check_mean(7, 50001, compensated, 3);
    for (const double share : {0.0, 0.1, 0.6, 1.0}) {
      for (const std::int64_t clients : {1, 2, 5}) {
        for (std::int64_t n = 0; n <= 35; ++n) check_masked_mean(clients, n, share, compensated, 1);
        for (const std::int64_t n : {4095, 4096, 4097, 9000}) check_masked_mean(clients, n, share, compensated, 1);
      }
      check_masked_mean(6, 50001, share, compensated, 3);
    }
  }

  begin_case("what float64 sums lose, compensated ones keep");
  const float large = 0x1p100F, one = 1.0F, less = -0x1p100F;
  float out = 0;
  weighted_mean({&large, &one, &less}, {1, 1, 1}, 1, false, &out, 1);
  CHECK(out == 0, std::to_string(out));
  weighted_mean({&large, &one, &less}, {1, 1, 1}, 1, true, &out, 1);
  CHECK(out == 1.0F / 3.0F, std::to_string(out));

  check_refused({0}, 0, 1);
  check_refused({3}, 3, 1);
  check_refused({-1}, 3, 1);
  check_refused({1, 1}, 3, 1);
  check_refused({2, 1}, 3, 1);
  std::vector<std::int32_t> places;
  for (std::int32_t j = 0; j < 60000; j += 2) places.push_back(j);
  for (const std::size_t i : {0, 1, 2048, 14999, 15000, 15001, 29998}) {
    for (const int threads : {1, 2, 3}) {
      std::vector<std::int32_t> wrong = places;
      std::swap(wrong[i], wrong[i + 1]);
      check_refused(wrong, 60000, threads);
      wrong = places;
      wrong[i] = 60000;
      check_refused(wrong, 60000, threads);
      wrong[i] = std::numeric_limits<std::int32_t>::min();
      check_refused(wrong, 60000, threads);
    }
  }

  for (const std::int64_t clients : {1, 2, 3, 7, 8, 100}) {
    for (const std::int64_t threshold : {std::int64_t{1}, (clients + 1) / 2, clients}) {
      for (const std::int64_t bytes : {0, 1, 7, 8, 9, 511, 512, 513}) check_majority(clients, bytes, threshold, 1);
    }
  }
  check_majority(9, 20001, 4, 3);

  for (const ServerStep rule : {ServerStep::kAvgM, ServerStep::kAdam, ServerStep::kYogi}) {
    for (std::int64_t n = 0; n <= 35; ++n) check_step(rule, n, 1);
    check_step(rule, 50001, 3);
  }
}
