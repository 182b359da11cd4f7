// SPDX-License-Identifier: Apache-2.0
// The schedules of one Plan, built on first use and kept for the geometries seen last.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/conv2d/schedule.h"

namespace fedpai {

class ScheduleCache {
 public:
  using Shared = std::shared_ptr<const Schedule>;

  // Thread-safe; a schedule in use outlives its eviction.
  Shared get(const Plan& plan, const ScheduleKey& key);

 private:
  // A training run sees the full batch, the last batch and the evaluation batch, each in three directions.
  static constexpr std::size_t kCapacity = 24;

  struct Entry {
    ScheduleKey key;
    ScheduleChoice choice;
    Shared schedule;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
};

// A Plan together with its schedules: what the binding holds.
struct CompiledPlan {
  CompiledPlan(const std::uint8_t* mask, const WeightShape& shape) : plan(mask, shape) {}

  Plan plan;
  mutable ScheduleCache schedules;
};

}  // namespace fedpai
