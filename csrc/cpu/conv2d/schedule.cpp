// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule.h"

#include <atomic>

#include "cpu/conv2d/stream_cost.h"

namespace fedpai {

namespace {

std::atomic<Walk> forced_walk{Walk::kChoose};

bool walks_by_input(Direction direction) {
  return direction == Direction::kInputGrad || direction == Direction::kBackward;
}

const EntryList& entries_of(const Plan& plan, const ScheduleKey& key) {
  return walks_by_input(key.direction) ? plan.by_input() : plan.by_output();
}

std::vector<PassAxes> axes_of(const Plan& plan, const ScheduleKey& key) {
  if (walks_by_input(key.direction)) return input_grad_axes(plan, key.geometry);
  return {forward_axes(plan, key.geometry)};
}

VectorShape vector_of(const ScheduleKey& key) { return {key.lanes, key.accumulators, key.element_size, key.panel}; }

// Both walks of one direction, as good as they can be, and what the cost models say of them.
struct Candidates {
  ScheduleChoice streamed, tiled;
  bool can_stream = true;
  double stream_cycles = 0, tiled_cycles = 0;

  bool streams(Walk walk) const {
    return can_stream && walk != Walk::kTiled && (walk == Walk::kStreamed || stream_cycles < tiled_cycles);
  }
  double cycles() const { return streams(Walk::kChoose) ? stream_cycles : tiled_cycles; }
};

Candidates candidates_of(const Plan& plan, const ScheduleKey& key) {
  const EntryList& list = entries_of(plan, key);
  const std::vector<PassAxes> passes = axes_of(plan, key);
  Candidates found;
  found.can_stream = key.adjacent && key.walk != Walk::kTiled;
  for (const PassAxes& axes : passes) {
    const TilingProblem problem =
        tiling_problem(axes, list, key.geometry.batch, vector_of(key), key.direction == Direction::kWeightGrad, key.threads);
    found.can_stream = found.can_stream && can_stream(axes, list, key.source);
    const StreamChoice stream = choose_stream(problem);
    found.streamed.stream_blocks.push_back(stream.blocks);
    found.stream_cycles += stream.cycles;
    if (found.can_stream && key.walk == Walk::kStreamed) continue;
    found.tiled.tilings.push_back(choose_tiling(problem, list, vector_of(key)));
    found.tiled_cycles += found.tiled.tilings.back().cycles;
  }
  // Tiled passes sweep over the dest one after the other, each touching a part of every line or page.
  constexpr double kSeparateSweeps = 1.8;
  if (passes.size() > 1) found.tiled_cycles *= kSeparateSweeps;
  return found;
}

// One walk that does both costs so much of the input gradient's: the loads are the same, the FMAs twice as many.
// lab/011_joint_backward has the measurements behind it.
constexpr double kBothGradients = 1.25;

// Threads divide the channels of x among them when both gradients go at once, so there must be enough.
constexpr std::int64_t kChannelsPerThread = 2;

ScheduleChoice choose_backward(const Plan& plan, const ScheduleKey& key) {
  ScheduleKey other = key;
  other.direction = Direction::kInputGrad;
  Candidates input_grad = candidates_of(plan, other);
  if (!input_grad.can_stream || plan.shape().in_channels() < kChannelsPerThread * key.threads) return {};
  if (key.walk == Walk::kStreamed) return input_grad.streamed;
  other.direction = Direction::kWeightGrad;  // whose tiles have a register or two less, which an estimate does not see
  const double apart = input_grad.cycles() + candidates_of(plan, other).cycles();
  return kBothGradients * input_grad.stream_cycles < apart ? input_grad.streamed : ScheduleChoice{};
}

}  // namespace

ScheduleChoice choose_schedule(const Plan& plan, const ScheduleKey& key) {
  if (key.direction == Direction::kBackward) return choose_backward(plan, key);
  Candidates found = candidates_of(plan, key);
  return found.streams(key.walk) ? found.streamed : found.tiled;
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
  for (std::size_t i = 0; i < choice.tilings.size(); ++i) {
    result.push_back(tiled_pass(passes[i], list, vector_of(key), choice.tilings[i]));
  }
  return result;
}

bool may_share(const ScheduleKey& a, const ScheduleKey& b) {
  return walks_by_input(a.direction) == walks_by_input(b.direction) && a.geometry == b.geometry &&
         a.lanes == b.lanes && a.panel == b.panel && a.element_size == b.element_size && a.adjacent == b.adjacent && a.source == b.source;
}

Walk walk_in_force() { return forced_walk.load(std::memory_order_relaxed); }

void force_walk(Walk walk) { forced_walk.store(walk, std::memory_order_relaxed); }

}  // namespace fedpai
