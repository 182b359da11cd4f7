// SPDX-License-Identifier: Apache-2.0
// One step of the server from the old model x towards the merged one, each element read once and written once.
//
//   delta = merged - x                                    the negative pseudo-gradient
//   FedAvgM   m = beta1 * m + delta                       x = x + lr * m
//   FedAdam   m = beta1 * m + (1 - beta1) * delta         v = beta2 * v + (1 - beta2) * delta^2
//   FedYogi   m likewise                                  v = v - (1 - beta2) * delta^2 * sign(v - delta^2)
//             both                                        x = x + lr * m / (sqrt(v) + tau)
//
// FedAvgM: Hsu, Qi and Brown, arXiv 1909.06335, with the server's learning rate of Reddi et al. FedAdam and
// FedYogi: Reddi et al., arXiv 2003.00295, Algorithm 2, which corrects no bias.
//
// Order: as written, in float32, without fused multiply-adds, so that every instruction set gives the same bits.
// Layout: n elements side by side in all arrays. Bound: memory; 20 bytes per element are moved for FedAvgM, 28 else.
#pragma once

#include "cpu/aggregate/kernels.h"
#include "cpu/optim/kernels-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

// v after the step.
template <ServerStep Rule>
FEDPAI_INLINE Vec<float>::reg server_square(const Vec<float>::reg& v, const Vec<float>::reg& delta,
                                            const ServerStepFactors& f) {
  using V = Vec<float>;
  const V::reg square = V::mul(delta, delta), change = V::mul(V::set1(f.pull2), square);
  if constexpr (Rule == ServerStep::kAdam) return V::add(V::mul(V::set1(f.beta2), v), change);
  const V::reg above = V::sub(v, square);
  const V::reg raised = V::where_gt0(V::sub(square, v), V::add(v, change), v);
  return V::where_gt0(above, V::sub(v, change), raised);
}

template <ServerStep Rule>
void server_step_form(const float* old, const float* merged, float* m, float* v, std::int64_t n,
                      const ServerStepFactors& f, float* out) {
  using V = Vec<float>;
  const V::reg lr = V::set1(f.lr), beta1 = V::set1(f.beta1), pull1 = V::set1(f.pull1), tau = V::set1(f.tau);
  optim_vectors<float>(n, [&](std::int64_t i, int lanes, auto access) __attribute__((always_inline)) {
    const V::reg x = access.load(old + i, lanes);
    const V::reg delta = V::sub(access.load(merged + i, lanes), x);
    const V::reg kept = V::mul(beta1, access.load(m + i, lanes));
    const V::reg mean = V::add(kept, Rule == ServerStep::kAvgM ? delta : V::mul(pull1, delta));
    access.store(m + i, mean, lanes);
    V::reg step = V::mul(lr, mean);
    if constexpr (Rule != ServerStep::kAvgM) {
      const V::reg square = server_square<Rule>(access.load(v + i, lanes), delta, f);
      access.store(v + i, square, lanes);
      step = V::div(step, V::add(V::sqrt(square), tau));
    }
    access.store(out + i, V::add(x, step), lanes);
  });
}

inline void aggregate_step(ServerStep rule, const float* old, const float* merged, float* m, float* v, std::int64_t n,
                           const ServerStepFactors& f, float* out) {
  switch (rule) {
    case ServerStep::kAvgM:
      return server_step_form<ServerStep::kAvgM>(old, merged, m, v, n, f, out);
    case ServerStep::kAdam:
      return server_step_form<ServerStep::kAdam>(old, merged, m, v, n, f, out);
    case ServerStep::kYogi:
      return server_step_form<ServerStep::kYogi>(old, merged, m, v, n, f, out);
  }
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
