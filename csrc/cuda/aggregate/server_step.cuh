// SPDX-License-Identifier: Apache-2.0
// One step of the server from the old model x towards the merged one, in one launch for a whole model.
//
//   delta = merged - x                                    the negative pseudo-gradient
//   FedAvgM   m = beta1 * m + delta                       x = x + lr * m
//   FedAdam   m = beta1 * m + (1 - beta1) * delta         v = beta2 * v + (1 - beta2) * delta^2
//   FedYogi   m likewise                                  v = v - (1 - beta2) * delta^2 * sign(v - delta^2)
//             both                                        x = x + lr * m / (sqrt(v) + tau)
//
// The operations, their order and their rounding are those of csrc/cpu/aggregate/step_kernels-inl.h, which names the sources:
// float32, an operation at a time, nothing fused. So the bits are the CPU's.
//
// Layout: n elements side by side in all arrays; a thread has V neighbours, 4 where all arrays begin at a multiple of that.
// The last thread of fours takes what is left one by one.
// Bound: memory. Bytes moved per element, the least there can be: FedAvgM 20, else 28. ResNet18 at 98 % (224 thousand
// weights): 6 MB, so 2 us at 3.35 TB/s; dense (11.2 million) 313 MB, so 94 us.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
#pragma once

#include <cmath>

#include "cpu/aggregate/kernels.h"
#include "cuda/common/vector.h"
#include "cuda/fedpai_cuda.h"

namespace fedpai::cuda {

struct ServerStepArgs {
  const float* old;
  const float* merged;
  float* m;
  float* v;    // null with kAvgM
  float* out;  // may be old or merged
  std::int64_t n;
  ServerStepFactors factors;
};

struct ServerElement {
  float x, m, v;
};

// One element after the step.
template <ServerStep Rule>
FEDPAI_DEVICE ServerElement stepped(float x, float merged, float m, [[maybe_unused]] float v, const ServerStepFactors& f) {
  const float delta = merged - x, kept = f.beta1 * m;
  const float mean = kept + (Rule == ServerStep::kAvgM ? delta : f.pull1 * delta);
  float step = f.lr * mean;
  if constexpr (Rule != ServerStep::kAvgM) {
    const float square = delta * delta, change = f.pull2 * square;
    if constexpr (Rule == ServerStep::kAdam) {
      v = f.beta2 * v + change;
    } else if (v - square > 0.0f) {
      v = v - change;
    } else if (square - v > 0.0f) {
      v = v + change;
    }
    step = step / (std::sqrt(v) + f.tau);
  }
  return {x + step, mean, v};
}

template <ServerStep Rule, int V>
FEDPAI_DEVICE void step_elements(const ServerStepArgs& a, std::int64_t first) {
  const Floats<V> x = load<V>(a.old + first), merged = load<V>(a.merged + first), m = load<V>(a.m + first);
  Floats<V> v = zeros<V>();
  if constexpr (Rule != ServerStep::kAvgM) v = load<V>(a.v + first);
  Floats<V> new_x, new_m, new_v;
  FEDPAI_DEVICE_UNROLL
  for (int i = 0; i < V; ++i) {
    const ServerElement own = stepped<Rule>(x.at[i], merged.at[i], m.at[i], v.at[i], a.factors);
    new_x.at[i] = own.x, new_m.at[i] = own.m, new_v.at[i] = own.v;
  }
  store(a.m + first, new_m);
  if constexpr (Rule != ServerStep::kAvgM) store(a.v + first, new_v);
  store(a.out + first, new_x);
}

// What thread `thread` does.
template <ServerStep Rule, int V>
FEDPAI_DEVICE void server_step(const ServerStepArgs& a, std::int64_t thread) {
  const std::int64_t first = thread * V;
  if (first + V <= a.n) return step_elements<Rule, V>(a, first);
  for (std::int64_t i = first; i < a.n; ++i) step_elements<Rule, 1>(a, i);
}

// ---- launches, on the host --------------------------------------------------------------------------------------

inline ServerStepArgs server_step_args(const FedpaiServerStep& s, const float* old, const float* merged, float* m, float* v,
                                       std::int64_t n, float* out) {
  const auto narrow = [](double factor) { return static_cast<float>(factor); };
  return {old, merged, m, v, out, n,
          {narrow(s.lr), narrow(s.beta1), narrow(1.0 - s.beta1), narrow(s.beta2), narrow(1.0 - s.beta2), narrow(s.tau)}};
}

inline int check_server_step(const FedpaiServerStep& s, const ServerStepArgs& a) {
  const auto is = [&s](ServerStep rule) { return s.rule == static_cast<std::int64_t>(rule); };
  if (!is(ServerStep::kAvgM) && !is(ServerStep::kAdam) && !is(ServerStep::kYogi)) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (a.n < 0 || (a.n > 0 && (a.v == nullptr) != is(ServerStep::kAvgM))) return FEDPAI_CUDA_BAD_ARGUMENT;
  return FEDPAI_CUDA_OK;
}

// A rule and the elements of a thread as constants.
template <ServerStep Rule, int V>
struct ServerStepForm {
  static constexpr ServerStep rule = Rule;
  static constexpr int elements = V;
};

template <ServerStep Rule, class F>
int with_elements(const ServerStepArgs& a, const F& body) {
  const void* const arrays[] = {a.old, a.merged, a.m, a.v, a.out};
  bool aligned = true;
  for (const void* array : arrays) aligned = aligned && reinterpret_cast<std::uintptr_t>(array) % sizeof(FourFloats) == 0;
  return aligned ? body(ServerStepForm<Rule, 4>()) : body(ServerStepForm<Rule, 1>());
}

// body(ServerStepForm) for the rule of a checked step.
template <class F>
int with_rule(const FedpaiServerStep& s, const ServerStepArgs& a, const F& body) {
  switch (static_cast<ServerStep>(s.rule)) {
    case ServerStep::kAvgM:
      return with_elements<ServerStep::kAvgM>(a, body);
    case ServerStep::kAdam:
      return with_elements<ServerStep::kAdam>(a, body);
    default:
      return with_elements<ServerStep::kYogi>(a, body);
  }
}

}  // namespace fedpai::cuda
