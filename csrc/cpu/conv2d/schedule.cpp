// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule.h"

#include <atomic>

#include "cpu/conv2d/stream_cost.h"

namespace fedpai {

namespace {

std::atomic<Walk> forced_walk{Walk::kChoose};

}  // namespace

Schedule build_schedule(const Plan& plan, const ScheduleKey& key) {
  const bool input_grad = key.direction == Direction::kInputGrad;
  const EntryList& list = input_grad ? plan.by_input() : plan.by_output();
  const std::vector<PassAxes> passes =
      input_grad ? input_grad_axes(plan, key.geometry) : std::vector<PassAxes>{forward_axes(plan, key.geometry)};
  const VectorShape vector{key.lanes, key.accumulators, key.element_size};

  bool can = key.adjacent && key.walk != Walk::kTiled;
  std::vector<StreamChoice> streams;
  std::vector<Tiling> tilings;
  double stream_cycles = 0, tiled_cycles = 0;
  for (const PassAxes& axes : passes) {
    const TilingProblem problem =
        tiling_problem(axes, list, key.geometry.batch, vector, key.direction == Direction::kWeightGrad);
    can = can && can_stream(axes, list, key.source);
    streams.push_back(choose_stream(problem));
    stream_cycles += streams.back().cycles;
    if (can && key.walk == Walk::kStreamed) continue;
    tilings.push_back(choose_tiling(problem));
    tiled_cycles += tilings.back().cycles;
  }
  // Tiled passes sweep over the dest one after the other, each touching a part of every line or page.
  constexpr double kSeparateSweeps = 1.8;
  if (passes.size() > 1) tiled_cycles *= kSeparateSweeps;

  if (can && (key.walk == Walk::kStreamed || stream_cycles < tiled_cycles)) {
    std::vector<StreamPass> result;
    for (std::size_t i = 0; i < passes.size(); ++i) {
      result.push_back(stream_pass(passes[i], list, key.source, streams[i].blocks));
    }
    return result;
  }
  std::vector<TiledPass> result;
  for (std::size_t i = 0; i < passes.size(); ++i) result.push_back(tiled_pass(passes[i], list, vector, tilings[i]));
  return result;
}

Walk walk_in_force() { return forced_walk.load(std::memory_order_relaxed); }

void force_walk(Walk walk) { forced_walk.store(walk, std::memory_order_relaxed); }

}  // namespace fedpai
