// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule.h"

#include <atomic>

#include "cpu/conv2d/stream_cost.h"

namespace fedpai {

namespace {

std::atomic<Walk> forced_walk{Walk::kChoose};

const EntryList& entries_of(const Plan& plan, const ScheduleKey& key) {
  return key.direction == Direction::kInputGrad ? plan.by_input() : plan.by_output();
}

std::vector<PassAxes> axes_of(const Plan& plan, const ScheduleKey& key) {
  if (key.direction == Direction::kInputGrad) return input_grad_axes(plan, key.geometry);
  return {forward_axes(plan, key.geometry)};
}

VectorShape vector_of(const ScheduleKey& key) { return {key.lanes, key.accumulators, key.element_size, key.panel}; }

}  // namespace

ScheduleChoice choose_schedule(const Plan& plan, const ScheduleKey& key) {
  const EntryList& list = entries_of(plan, key);
  const std::vector<PassAxes> passes = axes_of(plan, key);

  bool can = key.adjacent && key.walk != Walk::kTiled;
  ScheduleChoice streamed, tiled;
  double stream_cycles = 0, tiled_cycles = 0;
  for (const PassAxes& axes : passes) {
    const TilingProblem problem =
        tiling_problem(axes, list, key.geometry.batch, vector_of(key), key.direction == Direction::kWeightGrad, key.threads);
    can = can && can_stream(axes, list, key.source);
    const StreamChoice stream = choose_stream(problem);
    streamed.stream_blocks.push_back(stream.blocks);
    stream_cycles += stream.cycles;
    if (can && key.walk == Walk::kStreamed) continue;
    tiled.tilings.push_back(choose_tiling(problem, list, vector_of(key)));
    tiled_cycles += tiled.tilings.back().cycles;
  }
  // Tiled passes sweep over the dest one after the other, each touching a part of every line or page.
  constexpr double kSeparateSweeps = 1.8;
  if (passes.size() > 1) tiled_cycles *= kSeparateSweeps;
  return can && (key.walk == Walk::kStreamed || stream_cycles < tiled_cycles) ? streamed : tiled;
}

Schedule lay_out_schedule(const Plan& plan, const ScheduleKey& key, const ScheduleChoice& choice) {
  const EntryList& list = entries_of(plan, key);
  const std::vector<PassAxes> passes = axes_of(plan, key);
  if (choice.streamed()) {
    std::vector<StreamPass> result;
    for (std::size_t i = 0; i < passes.size(); ++i) {
      result.push_back(stream_pass(passes[i], list, key.source, choice.stream_blocks[i]));
    }
    return result;
  }
  std::vector<TiledPass> result;
  for (std::size_t i = 0; i < passes.size(); ++i) {
    result.push_back(tiled_pass(passes[i], list, vector_of(key), choice.tilings[i]));
  }
  return result;
}

bool may_share(const ScheduleKey& a, const ScheduleKey& b) {
  return a.direction != Direction::kInputGrad && b.direction != Direction::kInputGrad && a.geometry == b.geometry &&
         a.lanes == b.lanes && a.panel == b.panel && a.element_size == b.element_size && a.adjacent == b.adjacent && a.source == b.source;
}

Walk walk_in_force() { return forced_walk.load(std::memory_order_relaxed); }

void force_walk(Walk walk) { forced_walk.store(walk, std::memory_order_relaxed); }

}  // namespace fedpai
