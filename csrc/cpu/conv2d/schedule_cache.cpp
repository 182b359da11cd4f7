// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule_cache.h"

namespace fedpai {

namespace {

std::vector<Pass> build(const Plan& plan, Direction direction, const Conv2dGeometry& geometry,
                        const VectorShape& vector) {
  std::vector<Pass> passes;
  switch (direction) {
    case Direction::kForward:
      passes.push_back(forward_pass(plan, geometry, vector));
      break;
    case Direction::kInputGrad:
      passes = input_grad_passes(plan, geometry, vector);
      break;
    case Direction::kWeightGrad:
      passes.push_back(weight_grad_pass(plan, geometry, vector));
      break;
  }
  return passes;
}

}  // namespace

ScheduleCache::Passes ScheduleCache::get(const Plan& plan, Direction direction, const Conv2dGeometry& geometry,
                                         const VectorShape& vector) {
  // Building under the lock: two threads that need the same schedule should not both build it.
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (it->direction == direction && it->geometry == geometry && it->vector.lanes == vector.lanes &&
        it->vector.element_size == vector.element_size) {
      entries_.splice(entries_.begin(), entries_, it);
      return it->passes;
    }
  }
  auto passes = std::make_shared<const std::vector<Pass>>(build(plan, direction, geometry, vector));
  entries_.push_front({direction, geometry, vector, passes});
  if (entries_.size() > kCapacity) entries_.pop_back();
  return passes;
}

}  // namespace fedpai
