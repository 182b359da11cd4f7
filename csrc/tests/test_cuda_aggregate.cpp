// SPDX-License-Identifier: Apache-2.0
// Merging as a GPU's threads do it, run on the CPU one after another, against the CPU's kernels: the same bits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/aggregate/aggregate.h"
#include "cuda_host_aggregate.h"

using namespace fedpai;
using namespace fedpai::tests;
using namespace fedpai::cuda;

namespace {

float value_of(Random& random) { return static_cast<float>(2 * random.uniform() - 1); }

std::vector<double> weights_of(std::int64_t clients, Random& random) {
  std::vector<double> weights;
  for (std::int64_t k = 0; k < clients; ++k) weights.push_back(1 + static_cast<double>(random.next() % 1000));
  return weights;
}

template <class T>
void expect_bits(const Buffer<T>& got, const Buffer<T>& expected) {
  for (std::int64_t j = 0; j < expected.size(); ++j) {
    if (std::memcmp(&got[j], &expected[j], sizeof(T)) == 0) continue;
    CHECK(false, std::to_string(j) + " is " + std::to_string(got[j]) + ", expected " + std::to_string(expected[j]));
    return;
  }
  CHECK(true, "");
}

void check_mean(std::int64_t clients, std::int64_t n, std::int64_t gap, bool compensated) {
  begin_case("mean of " + std::to_string(clients) + " x " + std::to_string(n) + (compensated ? ", compensated" : ""));
  Random random(static_cast<std::uint64_t>(clients * 1000 + n));
  const std::vector<double> weights = weights_of(clients, random);
  const std::int64_t stride = n + gap;
  Buffer<float> vectors((clients - 1) * stride + n), out(n), expected(n);
  for (float& value : vectors) value = value_of(random);
  std::vector<const float*> rows;
  for (std::int64_t k = 0; k < clients; ++k) rows.push_back(vectors.data() + k * stride);
  weighted_mean(rows, weights, n, compensated, expected.data(), 1);
  run_mean({vectors.data(), weights.data(), out.data(), stride, n, static_cast<std::int32_t>(clients)}, compensated);
  expect_bits(out, expected);
}

// Clients' values and positions, one client behind the other.
struct Ragged {
  std::vector<float> values;
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> offsets{0};

  void add(const std::vector<std::int32_t>& own, Random& random) {
    positions.insert(positions.end(), own.begin(), own.end());
    for (std::size_t i = 0; i < own.size(); ++i) values.push_back(value_of(random));
    offsets.push_back(static_cast<std::int64_t>(positions.size()));
  }
  std::int64_t clients() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
};

// The table of segments, and who was wrong.
struct Segments {
  Segments(const Ragged& r, std::int64_t n) : begins((segments_of(n) + 1) * r.clients()), wrong(r.clients()) {
    run_segments({r.positions.data(), r.offsets.data(), begins.data(), wrong.data(), static_cast<std::int32_t>(n),
                  static_cast<std::int32_t>(r.clients()), static_cast<std::int32_t>(segments_of(n))});
  }
  Buffer<std::int32_t> begins, wrong;
};

template <bool Compensated>
void merge(const Ragged& r, const Segments& segments, const std::vector<double>& weights, const Buffer<float>& old, Buffer<float>& out) {
  const MaskedMeanArgs args{r.values.data(), r.positions.data(), r.offsets.data(), segments.begins.data(), weights.data(), old.data(),
                            out.data(), static_cast<std::int32_t>(out.size()), static_cast<std::int32_t>(r.clients())};
  run_masked_mean<Compensated>(args);
}

void check_masked_mean(std::int64_t clients, std::int64_t n, double share, bool compensated) {
  begin_case("masked mean of " + std::to_string(clients) + " x " + std::to_string(n) + ", share " + std::to_string(share) +
             (compensated ? ", compensated" : ""));
  Random random(static_cast<std::uint64_t>(clients * 1000 + n));
  const std::vector<double> weights = weights_of(clients, random);
  Ragged ragged;
  for (std::int64_t k = 0; k < clients; ++k) {
    std::vector<std::int32_t> own;
    for (std::int32_t j = 0; j < n; ++j) {
      if (random.uniform() < share) own.push_back(j);
    }
    ragged.add(own, random);
  }
  std::vector<MaskedVector> vectors;
  for (std::size_t k = 0; k < weights.size(); ++k) {
    const std::int64_t first = ragged.offsets[k];
    vectors.push_back({ragged.values.data() + first, ragged.positions.data() + first, ragged.offsets[k + 1] - first, weights[k]});
  }
  Buffer<float> old(n), out(n), expected(n);
  for (float& value : old) value = value_of(random);
  CHECK(masked_mean(vectors, old.data(), n, compensated, expected.data(), 1) == -1, "");
  const Segments segments(ragged, n);
  CHECK(std::all_of(segments.wrong.data(), segments.wrong.data() + clients, [](int w) { return w == 0; }), "positions are in order");
  compensated ? merge<true>(ragged, segments, weights, old, out) : merge<false>(ragged, segments, weights, old, out);
  expect_bits(out, expected);
}

// Positions that cannot be are told, whose they are, and what follows stays within the arrays.
void check_refused(const std::vector<std::int32_t>& wrong, std::int64_t n) {
  begin_case("refused positions, n=" + std::to_string(n));
  Random random(5);
  Ragged ragged;
  ragged.add({}, random);
  ragged.add(wrong, random);
  ragged.add(n > 1 ? std::vector<std::int32_t>{1} : std::vector<std::int32_t>{}, random);
  const Segments segments(ragged, n);
  CHECK(segments.wrong[0] == 0 && segments.wrong[1] == 1 && segments.wrong[2] == 0, "");
  Buffer<float> old(n), out(n);
  merge<false>(ragged, segments, {1, 1, 1}, old, out);
}

void check_majority(std::int64_t clients, std::int64_t bytes, std::int64_t threshold) {
  begin_case("majority of " + std::to_string(clients) + " x " + std::to_string(bytes) + " bytes, threshold " + std::to_string(threshold));
  Random random(static_cast<std::uint64_t>(clients * 1000 + bytes));
  const std::int64_t stride = bytes + 1;
  Buffer<std::uint8_t> bitmaps((clients - 1) * stride + bytes), out(bytes), expected(bytes);
  for (std::uint8_t& byte : bitmaps) byte = static_cast<std::uint8_t>(random.next());
  std::vector<const std::uint8_t*> rows;
  for (std::int64_t k = 0; k < clients; ++k) rows.push_back(bitmaps.data() + k * stride);
  majority(rows, threshold, bytes, expected.data(), 1);
  const MajorityArgs args{bitmaps.data(), out.data(), stride, bytes, static_cast<std::int32_t>(clients), static_cast<std::int32_t>(threshold)};
  for (std::int64_t i = 0; i < bytes / kVoteBytes + 3; ++i) vote(args, i);
  expect_bits(out, expected);
}

}  // namespace

FEDPAI_SUITE(cuda_host_aggregate) {
  for (const bool compensated : {false, true}) {
    for (const std::int64_t clients : {1, 2, 3, 4, 5, 8, 11}) {
      for (const std::int64_t n : {0, 1, 33, 257}) check_mean(clients, n, clients % 3, compensated);
    }
    for (const double share : {0.0, 0.02, 0.1, 0.6, 1.0}) {
      for (const std::int64_t clients : {1, 2, 4, 7}) {
        for (const std::int64_t n : {0, 1, 31, 1023, 1024, 1025, 5000}) check_masked_mean(clients, n, share, compensated);
      }
    }
  }

  check_refused({0}, 0);
  check_refused({3}, 3);
  check_refused({-1}, 3);
  check_refused({std::numeric_limits<std::int32_t>::min()}, 3);
  check_refused({1, 1}, 3);
  check_refused({2, 1}, 3);
  std::vector<std::int32_t> places;
  for (std::int32_t j = 0; j < 9000; j += 2) places.push_back(j);
  for (const std::size_t i : {0, 1, 511, 512, 2048, 4498}) {
    std::vector<std::int32_t> wrong = places;
    std::swap(wrong[i], wrong[i + 1]);
    check_refused(wrong, 9000);
    wrong = places;
    for (const std::int32_t place : {9000, -5, std::numeric_limits<std::int32_t>::max()}) {
      wrong[i] = place;
      check_refused(wrong, 9000);
    }
  }

  for (const std::int64_t clients : {1, 2, 3, 7, 8, 100, 300}) {
    for (const std::int64_t threshold : {std::int64_t{1}, (clients + 1) / 2, clients}) {
      for (const std::int64_t bytes : {0, 1, 3, 4, 5, 63}) check_majority(clients, bytes, threshold);
    }
  }
}
