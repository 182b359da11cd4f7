// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule.h"

#include <atomic>

#include "cpu/conv2d/stream_cost.h"

namespace fedpai {

namespace {

std::atomic<Walk> forced_walk{Walk::kChoose};

Pass build_pass(const PassAxes& axes, const EntryList& list, const ScheduleKey& key) {
  const VectorShape vector{key.lanes, key.accumulators, key.element_size};
  const TilingProblem problem =
      tiling_problem(axes, list, key.geometry.batch, vector, key.direction == Direction::kWeightGrad);
  const bool possible = key.adjacent && key.walk != Walk::kTiled && can_stream(axes, list, key.source);
  const StreamChoice stream = choose_stream(problem);
  if (possible && key.walk == Walk::kStreamed) return stream_pass(axes, list, key.source, stream.blocks);
  const Tiling tiling = choose_tiling(problem);
  if (possible && stream.cycles < tiling.cycles) return stream_pass(axes, list, key.source, stream.blocks);
  return tiled_pass(axes, list, vector, tiling);
}

}  // namespace

std::vector<Pass> build_passes(const Plan& plan, const ScheduleKey& key) {
  std::vector<Pass> passes;
  if (key.direction == Direction::kInputGrad) {
    for (const PassAxes& axes : input_grad_axes(plan, key.geometry)) {
      passes.push_back(build_pass(axes, plan.by_input(), key));
    }
  } else {
    passes.push_back(build_pass(forward_axes(plan, key.geometry), plan.by_output(), key));
  }
  return passes;
}

Walk walk_in_force() { return forced_walk.load(std::memory_order_relaxed); }

void force_walk(Walk walk) { forced_walk.store(walk, std::memory_order_relaxed); }

}  // namespace fedpai
