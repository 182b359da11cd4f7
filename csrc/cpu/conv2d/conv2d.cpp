// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/conv2d.h"

#include <algorithm>

#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"

namespace fedpai {

namespace {

template <class T>
VectorShape vector_shape(const Conv2dKernels<T>& kernels) {
  return {kernels.lanes, kernels.accumulators, static_cast<std::int64_t>(sizeof(T))};
}

}  // namespace

template <class T>
void conv2d_forward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const T* values,
                    const T* bias, Images<T> y, int threads) {
  if (geometry.batch == 0) return;
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kForward, geometry, vector_shape(kernels));
  run_pass(passes->front(), kernels, geometry.batch, x, values, bias, y, threads);
}

template <class T>
void conv2d_input_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> dy, const T* values,
                       Images<T> dx, int threads) {
  if (geometry.batch == 0) return;
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kInputGrad, geometry, vector_shape(kernels));
  for (const Pass& pass : *passes) {
    run_pass<T>(pass, kernels, geometry.batch, dy, values, nullptr, dx, threads);
  }
}

template <class T>
void conv2d_weight_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, Images<const T> dy,
                        T* values_grad, T* bias_grad, int threads) {
  if (geometry.batch == 0) {
    std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
    if (bias_grad != nullptr) std::fill(bias_grad, bias_grad + plan.plan.shape().out_channels, T(0));
    return;
  }
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kWeightGrad, geometry, vector_shape(kernels));
  // A tap that only ever reads padding is not in the pass: its gradient is zero.
  if (passes->front().entries() < plan.plan.nnz()) std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
  run_weight_grad(passes->front(), kernels, geometry.batch, x, dy, values_grad, bias_grad, threads);
}

#define FEDPAI_INSTANTIATE(T)                                                                                        \
  template void conv2d_forward<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const T*, const T*,   \
                                  Images<T>, int);                                                                   \
  template void conv2d_input_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const T*,          \
                                     Images<T>, int);                                                                \
  template void conv2d_weight_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, Images<const T>, T*, T*, \
                                      int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)

}  // namespace fedpai
