// SPDX-License-Identifier: Apache-2.0
// The loops whose rates make the roofline compute what they say; how fast they are is the machine's affair.
#include <cmath>
#include <stdexcept>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/machine/machine.h"

using namespace fedpai;
using fedpai::tests::begin_case;

namespace {

template <class F>
bool refused(const F& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

struct alignas(64) Line {
  float value[16];
};

}  // namespace

FEDPAI_SUITE(machine) {
  const MachineKernels<float>& k = kernels().machine_f32;
  const std::int64_t a = k.accumulators, lanes = k.lanes;

  begin_case("multiply-adds between registers");
  const auto start = static_cast<float>(lanes * a * (a - 1) / 2);
  CHECK(k.fma_registers(0) == start, std::to_string(k.fma_registers(0)));
  CHECK(k.fma_registers(3) == start + static_cast<float>(3 * lanes * a), std::to_string(k.fma_registers(3)));

  begin_case("multiply-adds with loads take every element once a round");
  constexpr std::int64_t kLines = 4 * 32;  // four times the most accumulators there are, a vector to a line
  std::vector<Line> source(kLines), dest(kLines);
  float sum = 0;
  const std::int64_t vectors = 3 * a;
  float* const from = source[0].value;
  for (std::int64_t i = 0; i < kLines * 16; ++i) from[i] = static_cast<float>(i % 7);
  for (std::int64_t i = 0; i < vectors * lanes; ++i) sum += from[i];
  CHECK(vectors * lanes <= kLines * 16, "the buffer is too small");
  CHECK(k.fma_loads(from, vectors, 2) == 2 * sum, std::to_string(k.fma_loads(from, vectors, 2)));

  begin_case("scale writes every element");
  float* const to = dest[0].value;
  for (std::int64_t i = 0; i < kLines * 16; ++i) to[i] = -1.0F;
  k.scale(from, to, 8 * lanes, 3.0F);
  for (std::int64_t i = 0; i < 8 * lanes; ++i) CHECK(to[i] == 3.0F * from[i], std::to_string(i));
  CHECK(to[8 * lanes] == -1.0F, "written behind the end");

  begin_case("rates are positive numbers");
  for (const int threads : {1, 2}) {
    for (const std::int64_t bytes : {0, 1, 16384}) {
      const double rate = fma_rate(bytes, threads, 1e-3);
      CHECK(std::isfinite(rate) && rate > 0, std::to_string(rate));
    }
    for (const std::int64_t bytes : {1, 100000}) {
      const double rate = stream_rate(bytes, threads, 1e-3);
      CHECK(std::isfinite(rate) && rate > 0, std::to_string(rate));
    }
  }
  CHECK(loads_per_fma().forward > 1 && loads_per_fma().forward < 2, std::to_string(loads_per_fma().forward));
  CHECK(loads_per_fma().weight_grad > 1 && loads_per_fma().weight_grad < 2, std::to_string(loads_per_fma().weight_grad));

  begin_case("what cannot be measured is refused");
  CHECK(refused([] { fma_rate(0, 0, 1e-3); }), "no threads");
  CHECK(refused([] { fma_rate(-1, 1, 1e-3); }), "negative size");
  CHECK(refused([] { stream_rate(1024, 1, 0.0); }), "no time");
}
