// SPDX-License-Identifier: Apache-2.0
// Optimiser steps against their formulas in float64: chunks shorter, equal and longer than vectors and threads' shares.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/optim/optim.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

using Values = std::vector<double>;

// One parameter with its gradient and up to three arrays of state.
template <class T>
struct Arrays {
  explicit Arrays(std::int64_t n) : p(n), g(n), a(n), b(n), c(n) {}
  Buffer<T> p, g, a, b, c;
};

template <class T>
std::vector<Arrays<T>> random_arrays(const std::vector<std::int64_t>& counts, bool integers) {
  Random random(7);
  std::vector<Arrays<T>> arrays;
  for (const std::int64_t n : counts) {
    Arrays<T>& own = arrays.emplace_back(n);
    for (Buffer<T>* buffer : {&own.p, &own.g, &own.a, &own.b, &own.c}) {
      for (T& value : *buffer) {
        value = static_cast<T>(integers ? random.integer(8) : 2 * random.uniform() - 1);
        if (buffer == &own.b || buffer == &own.c) value = value < 0 ? -value : value;  // mean squares
      }
    }
  }
  return arrays;
}

template <class T>
Values values_of(const Buffer<T>& buffer) {
  Values values;
  for (std::int64_t i = 0; i < buffer.size(); ++i) values.push_back(static_cast<double>(buffer[i]));
  return values;
}

template <class T>
void expect_near(const char* what, const Buffer<T>& got, const Values& expected, bool exact) {
  const double allowed = exact ? 0 : 32 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::int64_t i = 0; i < got.size(); ++i) {
    const double value = expected[static_cast<std::size_t>(i)];
    if (std::abs(static_cast<double>(got[i]) - value) <= allowed * (1 + std::abs(value))) continue;
    CHECK(false, std::string(what) + "[" + std::to_string(i) + "] of " + std::to_string(got.size()) + " is " +
                     std::to_string(got[i]) + ", expected " + std::to_string(value));
    return;
  }
  CHECK(true, "");
}

// With powers of two as factors and small integers as values every step is exact, so all bits must agree.
template <class T>
void check_sgd(const std::vector<std::int64_t>& counts, const SgdOptions& options, bool first, bool exact,
               int threads) {
  std::vector<Arrays<T>> arrays = random_arrays<T>(counts, exact);
  std::vector<SgdChunk<T>> chunks;
  std::vector<Values> params, buffers;
  const double sign = options.maximize ? -1 : 1;
  for (Arrays<T>& own : arrays) {
    Values p = values_of(own.p), g = values_of(own.g), b = values_of(own.a);
    for (std::size_t i = 0; i < p.size(); ++i) {
      double step = sign * g[i] + options.weight_decay * p[i];
      if (options.momentum != 0) {
        b[i] = first ? step : options.momentum * b[i] + (1 - options.dampening) * step;
        step = options.nesterov ? step + options.momentum * b[i] : b[i];
      }
      p[i] -= options.lr * step;
    }
    params.push_back(p);
    buffers.push_back(b);
    if (first) {
      for (T& value : own.a) value = std::numeric_limits<T>::quiet_NaN();  // must not be read
    }
    chunks.push_back({own.p.data(), own.g.data(), options.momentum != 0 ? own.a.data() : nullptr, own.p.size(), first});
  }
  sgd_step(chunks, options, threads);
  for (std::size_t c = 0; c < arrays.size(); ++c) {
    expect_near("p", arrays[c].p, params[c], exact);
    if (options.momentum != 0) expect_near("buffer", arrays[c].a, buffers[c], exact);
  }
}

template <class T>
void check_adam(const std::vector<std::int64_t>& counts, const AdamOptions& o, bool amsgrad, int threads) {
  std::vector<Arrays<T>> arrays = random_arrays<T>(counts, false);
  std::vector<AdamChunk<T>> chunks;
  std::vector<std::vector<Values>> expected;
  double step = 1;
  for (Arrays<T>& own : arrays) {
    Values p = values_of(own.p), g = values_of(own.g), m = values_of(own.a), v = values_of(own.b), w = values_of(own.c);
    for (std::size_t i = 0; i < p.size(); ++i) {
      double grad = o.maximize ? -g[i] : g[i];
      if (o.decoupled) {
        p[i] *= 1 - o.lr * o.weight_decay;
      } else {
        grad += o.weight_decay * p[i];
      }
      m[i] = o.beta1 * m[i] + (1 - o.beta1) * grad;
      v[i] = o.beta2 * v[i] + (1 - o.beta2) * grad * grad;
      if (amsgrad) w[i] = std::max(w[i], v[i]);
      const double root = std::sqrt((amsgrad ? w[i] : v[i]) / (1 - std::pow(o.beta2, step)));
      p[i] -= o.lr * m[i] / (1 - std::pow(o.beta1, step)) / (root + o.eps);
    }
    expected.push_back({p, m, v, w});
    chunks.push_back({own.p.data(), own.g.data(), own.a.data(), own.b.data(), amsgrad ? own.c.data() : nullptr,
                      own.p.size(), step});
    step += 1;
  }
  adam_step(chunks, o, threads);
  for (std::size_t c = 0; c < arrays.size(); ++c) {
    expect_near("p", arrays[c].p, expected[c][0], false);
    expect_near("m", arrays[c].a, expected[c][1], false);
    expect_near("v", arrays[c].b, expected[c][2], false);
    if (amsgrad) expect_near("v_max", arrays[c].c, expected[c][3], false);
  }
}

void check_all(const std::string& name, const std::vector<std::int64_t>& counts, int threads) {
  for (int choice = 0; choice < 32; ++choice) {
    const bool decay = choice & 1, nesterov = choice & 2, maximize = choice & 4;
    const bool first = choice & 8, momentum = choice & 16;
    begin_case("sgd " + name + " choice " + std::to_string(choice));
    const double dampening = nesterov ? 0 : 0.5;
    const SgdOptions exact{0.25, momentum ? 0.5 : 0, dampening, decay ? 0.125 : 0, nesterov, maximize};
    check_sgd<float>(counts, exact, first, true, threads);
    check_sgd<double>(counts, exact, first, true, threads);
    const SgdOptions rounded{0.1, momentum ? 0.9 : 0, nesterov ? 0 : 0.2, decay ? 0.01 : 0, nesterov, maximize};
    check_sgd<float>(counts, rounded, first, false, threads);
    check_sgd<double>(counts, rounded, first, false, threads);
  }
  for (int choice = 0; choice < 32; ++choice) {
    begin_case("adam " + name + " choice " + std::to_string(choice));
    const double beta1 = choice & 16 ? 0.3 : 0.9;  // a large pull, and a small one
    const AdamOptions options{0.1, beta1, 0.99, 1e-3, choice & 1 ? 0.1 : 0, (choice & 2) != 0, (choice & 4) != 0};
    check_adam<float>(counts, options, (choice & 8) != 0, threads);
    check_adam<double>(counts, options, (choice & 8) != 0, threads);
  }
}

}  // namespace

FEDPAI_SUITE(optim) {
  check_all("no chunks", {}, 2);
  for (std::int64_t n = 0; n <= 33; ++n) check_all(std::to_string(n), {n}, 1);
  check_all("several", {5, 0, 1, 64, 17, 0, 3}, 2);
  check_all("shared by threads", {7, 40000, 0, 9, 1000, 25001}, 3);

  begin_case("disjoint");
  CHECK(disjoint({}, {}), "");
  CHECK(disjoint({{30, 40}, {10, 20}, {20, 30}}, {{0, 10}, {40, 50}, {0, 5}}), "");
  CHECK(disjoint({{10, 20}, {15, 15}}, {{12, 12}}), "empty extents are nowhere");
  CHECK(!disjoint({{30, 41}, {10, 20}, {40, 50}}, {}), "");
  CHECK(!disjoint({{10, 20}, {10, 20}}, {}), "");
  CHECK(!disjoint({{10, 20}, {30, 40}}, {{0, 11}}), "");
  CHECK(!disjoint({{10, 20}, {30, 40}}, {{39, 60}}), "");
  CHECK(!disjoint({{10, 20}, {30, 40}}, {{12, 13}}), "");
  CHECK(!disjoint({{10, 20}, {30, 40}}, {{5, 60}}), "");
}
