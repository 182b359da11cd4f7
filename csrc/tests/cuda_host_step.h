// SPDX-License-Identifier: Apache-2.0
// A step of the server as a GPU takes it, on the CPU, thread after thread.
#pragma once

#include "cuda/aggregate/server_step.cuh"

namespace fedpai::cuda {

inline int run_server_step(const FedpaiServerStep& step, const float* old, const float* merged, float* m, float* v, std::int64_t n,
                           float* out) {
  const ServerStepArgs args = server_step_args(step, old, merged, m, v, n, out);
  if (const int error = check_server_step(step, args)) return error;
  return with_rule(step, args, [&](auto form) {
    using Form = decltype(form);
    // More threads than there is work for, as in the last block.
    for (std::int64_t thread = 0; thread < n / Form::elements + 3; ++thread) server_step<Form::rule, Form::elements>(args, thread);
    return static_cast<int>(FEDPAI_CUDA_OK);
  });
}

}  // namespace fedpai::cuda
