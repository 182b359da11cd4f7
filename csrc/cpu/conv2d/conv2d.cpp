// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/conv2d.h"

#include <algorithm>
#include <variant>

#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"
#include "cpu/norm/norm.h"
#include "memory/block_cache.h"

namespace fedpai {

namespace {

template <class T>
ScheduleKey schedule_key(Direction direction, const Conv2dGeometry& geometry, const Images<const T>& source,
                         bool dest_adjacent, int threads) {
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const bool adjacent = dest_adjacent && source.batch == 1;
  return {direction,
          geometry,
          kernels.lanes,
          direction == Direction::kWeightGrad ? kernels.pinned : kernels.accumulators,
          kernels.panel,
          static_cast<std::int64_t>(sizeof(T)),
          adjacent,
          adjacent ? SourceStrides{source.channel, source.row, source.column} : SourceStrides{0, 0, 0},
          walk_in_force(),
          threads};
}

// norm(x), for the walk that reads its source where it lies.
template <class T>
class Normalised {
 public:
  Normalised(const Images<const T>& x, const NormMap<T>& norm, const Plan& plan, const Conv2dGeometry& g, int threads)
      : images_(x) {
    const NormShape shape{plan.shape().in_channels(), g.batch * g.in_h * g.in_w};
    block_ = block_cache().allocate(static_cast<std::size_t>(shape.channels * shape.row) * sizeof(T));
    images_.data = static_cast<const T*>(block_.data);
    normalise(shape, x.data, norm, static_cast<T*>(block_.data), threads);
  }
  Normalised(const Normalised&) = delete;
  Normalised& operator=(const Normalised&) = delete;
  ~Normalised() { block_cache().free(block_); }

  const Images<const T>& images() const { return images_; }

 private:
  Images<const T> images_;
  Block block_;
};

template <class A, class B>
bool lie_alike(const Images<A>& a, const Images<B>& b) {
  return a.batch == b.batch && a.channel == b.channel && a.row == b.row && a.column == b.column;
}

std::int64_t entries_of(const std::vector<StreamPass>& passes) {
  std::int64_t entries = 0;
  for (const StreamPass& pass : passes) entries += pass.entries();
  return entries;
}

template <class T>
void run_passes(const CompiledPlan& plan, const ScheduleKey& key, const Images<const T>& source, const NormMap<T>* norm,
                const T* values, const T* bias, const Images<T>& dest, int threads) {
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto schedule = plan.schedules.get(plan.plan, key);
  if (const auto* streamed = std::get_if<std::vector<StreamPass>>(schedule.get())) {
    if (norm != nullptr) {
      const Normalised<T> normalised(source, *norm, plan.plan, key.geometry, threads);
      run_streamed(*streamed, kernels, key.geometry.batch, normalised.images(), values, bias, dest, threads);
    } else {
      run_streamed(*streamed, kernels, key.geometry.batch, source, values, bias, dest, threads);
    }
    return;
  }
  for (const TiledPass& pass : std::get<std::vector<TiledPass>>(*schedule)) {
    run_tiled(pass, kernels, key.geometry.batch, source, norm, values, bias, dest, threads);
  }
}

}  // namespace

template <class T>
void conv2d_forward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                    const T* values, const T* bias, Images<T> y, int threads) {
  if (geometry.batch == 0) return;
  const ScheduleKey key = schedule_key<T>(Direction::kForward, geometry, x, y.batch == 1, threads);
  run_passes<T>(plan, key, x, norm, values, bias, y, threads);
}

template <class T>
void conv2d_input_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> dy, const T* values,
                       Images<T> dx, int threads) {
  if (geometry.batch == 0) return;
  const ScheduleKey key = schedule_key<T>(Direction::kInputGrad, geometry, dy, dx.batch == 1, threads);
  run_passes<T>(plan, key, dy, nullptr, values, nullptr, dx, threads);
}

template <class T>
void conv2d_weight_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                        Images<const T> dy, T* values_grad, T* bias_grad, int threads) {
  if (geometry.batch == 0) {
    std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
    if (bias_grad != nullptr) std::fill(bias_grad, bias_grad + plan.plan.shape().out_channels, T(0));
    return;
  }
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto schedule =
      plan.schedules.get(plan.plan, schedule_key<T>(Direction::kWeightGrad, geometry, x, dy.batch == 1, threads));
  const auto run = [&](const auto& pass, std::int64_t weights, const auto& run_grad) {
    // A tap that only ever reads padding is not in the pass: its gradient is zero.
    if (weights < plan.plan.nnz()) std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
    run_grad(pass);
  };
  if (const auto* streamed = std::get_if<std::vector<StreamPass>>(schedule.get())) {
    const auto run_on = [&](const Images<const T>& source) {
      run(streamed->front(), streamed->front().entries(), [&](const StreamPass& pass) {
        run_streamed_grad(pass, kernels, geometry.batch, source, dy, values_grad, bias_grad, threads);
      });
    };
    if (norm != nullptr) run_on(Normalised<T>(x, *norm, plan.plan, geometry, threads).images());
    else run_on(x);
  } else {
    const TiledPass& tiled = std::get<std::vector<TiledPass>>(*schedule).front();
    run(tiled, tiled.weights, [&](const TiledPass& pass) {
      run_tiled_grad(pass, kernels, geometry.batch, x, norm, dy, values_grad, bias_grad, threads);
    });
  }
}

template <class T>
void conv2d_backward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const NormMap<T>* norm,
                     Images<const T> dy, const T* values, Images<T> dx, T* values_grad, T* bias_grad, int threads) {
  if (geometry.batch > 0 && lie_alike(x, dx)) {
    const auto schedule =
        plan.schedules.get(plan.plan, schedule_key<T>(Direction::kBackward, geometry, dy, dx.batch == 1, threads));
    if (const auto* passes = std::get_if<std::vector<StreamPass>>(schedule.get())) {
      const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
      if (entries_of(*passes) < plan.plan.nnz()) std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
      const auto run_on = [&](const Images<const T>& source, const NormMap<T>* on_the_way) {
        run_streamed_backward(*passes, kernels, geometry.batch, source, on_the_way, dy, values, dx, values_grad, threads);
      };
      if (norm == nullptr || normalises_bands(*passes, geometry.batch)) run_on(x, norm);
      else run_on(Normalised<T>(x, *norm, plan.plan, geometry, threads).images(), nullptr);
      if (bias_grad != nullptr) sum_channels(geometry, plan.plan.shape().out_channels, kernels, dy, bias_grad, threads);
      return;
    }
  }
  conv2d_weight_grad<T>(plan, geometry, x, norm, dy, values_grad, bias_grad, threads);
  conv2d_input_grad<T>(plan, geometry, dy, values, dx, threads);
}

#define FEDPAI_INSTANTIATE(T)                                                                                        \
  template void conv2d_forward<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const NormMap<T>*,    \
                                  const T*, const T*, Images<T>, int);                                               \
  template void conv2d_input_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const T*,          \
                                     Images<T>, int);                                                                \
  template void conv2d_weight_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>,                   \
                                      const NormMap<T>*, Images<const T>, T*, T*, int);                              \
  template void conv2d_backward<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const NormMap<T>*,   \
                                   Images<const T>, const T*, Images<T>, T*, T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)

}  // namespace fedpai
