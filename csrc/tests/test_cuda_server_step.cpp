// SPDX-License-Identifier: Apache-2.0
// Steps of the server as a GPU's threads do them, run on the CPU one after another, against the CPU's kernels: the same bits.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "cpu/aggregate/aggregate.h"
#include "cuda_host_step.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

struct Arrays {
  Arrays(std::int64_t n, std::int64_t shift) : x(n + shift), merged(n), m(n), v(n), out(n) {
    Random random(static_cast<std::uint64_t>(n + 1));
    const auto draw = [&random] { return static_cast<float>(2 * random.uniform() - 1); };
    for (std::int64_t j = 0; j < n; ++j) {
      x[j + shift] = draw(), merged[j] = draw(), m[j] = draw(), v[j] = std::abs(draw());
      const float delta = merged[j] - x[j + shift];
      if (j % 5 == 1) v[j] = delta * delta;  // where Yogi's sign is zero
      if (j % 97 == 13) v[j] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  Buffer<float> x, merged, m, v, out;
};

void expect_bits(const char* what, const Buffer<float>& got, const Buffer<float>& expected) {
  std::int64_t wrong = -1;
  for (std::int64_t j = 0; j < expected.size() && wrong < 0; ++j) {
    const bool same = std::memcmp(&got[j], &expected[j], sizeof(float)) == 0 || (std::isnan(got[j]) && std::isnan(expected[j]));
    if (!same) wrong = j;
  }
  CHECK(wrong < 0, std::string(what) + "[" + std::to_string(wrong) + "]");
}

// shift: of the first array, in elements; threads then move one element at a time.
void check_step(ServerStep rule, std::int64_t n, std::int64_t shift) {
  begin_case("server step " + std::to_string(static_cast<int>(rule)) + " of " + std::to_string(n) + ", shifted by " + std::to_string(shift));
  const FedpaiServerStep step{0.3, 0.9, 0.99, 1e-3, static_cast<std::int64_t>(rule)};
  const auto narrow = [](double factor) { return static_cast<float>(factor); };
  const ServerStepFactors factors{narrow(step.lr),    narrow(step.beta1),       narrow(1.0 - step.beta1),
                                  narrow(step.beta2), narrow(1.0 - step.beta2), narrow(step.tau)};
  const bool has_v = rule != ServerStep::kAvgM;
  Arrays got(n, shift), expected(n, shift), in_place(n, shift);
  server_step(rule, expected.x.data() + shift, expected.merged.data(), expected.m.data(), has_v ? expected.v.data() : nullptr, n, factors,
              expected.out.data(), 1);
  const auto run = [&](Arrays& a, float* out) {
    CHECK(cuda::run_server_step(step, a.x.data() + shift, a.merged.data(), a.m.data(), has_v ? a.v.data() : nullptr, n, out) == FEDPAI_CUDA_OK, "");
  };
  run(got, got.out.data());
  expect_bits("x", got.out, expected.out);
  expect_bits("m", got.m, expected.m);
  expect_bits("v", got.v, expected.v);
  run(in_place, in_place.merged.data());
  expect_bits("x in place of merged", in_place.merged, expected.out);
}

}  // namespace

FEDPAI_SUITE(cuda_host_server_step) {
  for (const ServerStep rule : {ServerStep::kAvgM, ServerStep::kAdam, ServerStep::kYogi}) {
    for (const std::int64_t n : {0, 1, 3, 4, 5, 31, 32, 1023, 1024, 5001}) {
      for (const std::int64_t shift : {0, 1}) check_step(rule, n, shift);
    }
  }
  begin_case("what cannot be is refused");
  float a[4] = {};
  const auto code = [&](std::int64_t rule, float* v, std::int64_t n) {
    return cuda::run_server_step({0.1, 0.9, 0.99, 1e-3, rule}, a, a, a, v, n, a);
  };
  CHECK(code(3, a, 1) == FEDPAI_CUDA_BAD_ARGUMENT, "a rule that there is not");
  CHECK(code(0, a, 1) == FEDPAI_CUDA_BAD_ARGUMENT && code(1, nullptr, 1) == FEDPAI_CUDA_BAD_ARGUMENT, "v");
  CHECK(code(0, nullptr, -1) == FEDPAI_CUDA_BAD_ARGUMENT, "n");
}
