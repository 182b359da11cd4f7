// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule_cache.h"

namespace fedpai {

ScheduleCache::Shared ScheduleCache::get(const Plan& plan, const ScheduleKey& key) {
  // Building under the lock: two threads that need the same schedule should not both build it.
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (it->key == key) {
      entries_.splice(entries_.begin(), entries_, it);
      return it->schedule;
    }
  }
  auto schedule = std::make_shared<const Schedule>(build_schedule(plan, key));
  entries_.push_front({key, schedule});
  if (entries_.size() > kCapacity) entries_.pop_back();
  return schedule;
}

}  // namespace fedpai
