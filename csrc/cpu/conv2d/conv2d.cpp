// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/conv2d.h"

#include <algorithm>
#include <variant>

#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"

namespace fedpai {

namespace {

template <class T>
ScheduleKey schedule_key(Direction direction, const Conv2dGeometry& geometry, const Images<const T>& source,
                         bool dest_adjacent) {
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const bool adjacent = dest_adjacent && source.batch == 1;
  return {direction,
          geometry,
          kernels.lanes,
          direction == Direction::kWeightGrad ? kernels.pinned : kernels.accumulators,
          static_cast<std::int64_t>(sizeof(T)),
          adjacent,
          adjacent ? SourceStrides{source.channel, source.row, source.column} : SourceStrides{0, 0, 0},
          walk_in_force()};
}

template <class T>
void run_passes(const CompiledPlan& plan, const ScheduleKey& key, const Images<const T>& source, const T* values,
                const T* bias, const Images<T>& dest, int threads) {
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto schedule = plan.schedules.get(plan.plan, key);
  if (const auto* streamed = std::get_if<std::vector<StreamPass>>(schedule.get())) {
    run_streamed(*streamed, kernels, key.geometry.batch, source, values, bias, dest, threads);
    return;
  }
  for (const TiledPass& pass : std::get<std::vector<TiledPass>>(*schedule)) {
    run_tiled(pass, kernels, key.geometry.batch, source, values, bias, dest, threads);
  }
}

}  // namespace

template <class T>
void conv2d_forward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const T* values,
                    const T* bias, Images<T> y, int threads) {
  if (geometry.batch == 0) return;
  run_passes<T>(plan, schedule_key<T>(Direction::kForward, geometry, x, y.batch == 1), x, values, bias, y, threads);
}

template <class T>
void conv2d_input_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> dy, const T* values,
                       Images<T> dx, int threads) {
  if (geometry.batch == 0) return;
  run_passes<T>(plan, schedule_key<T>(Direction::kInputGrad, geometry, dy, dx.batch == 1), dy, values, nullptr, dx,
                threads);
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
  const auto schedule =
      plan.schedules.get(plan.plan, schedule_key<T>(Direction::kWeightGrad, geometry, x, dy.batch == 1));
  const auto run = [&](const auto& pass, auto run_grad) {
    // A tap that only ever reads padding is not in the pass: its gradient is zero.
    if (pass.entries() < plan.plan.nnz()) std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
    run_grad(pass, kernels, geometry.batch, x, dy, values_grad, bias_grad, threads);
  };
  if (const auto* streamed = std::get_if<std::vector<StreamPass>>(schedule.get())) {
    run(streamed->front(), run_streamed_grad<T>);
  } else {
    run(std::get<std::vector<TiledPass>>(*schedule).front(), run_tiled_grad<T>);
  }
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
