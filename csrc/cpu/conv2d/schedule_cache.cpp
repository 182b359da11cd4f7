// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule_cache.h"

#include <utility>

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
  ScheduleChoice choice = choose_schedule(plan, key);
  Shared schedule;
  for (const Entry& entry : entries_) {
    if (may_share(entry.key, key) && entry.choice == choice) schedule = entry.schedule;
  }
  if (schedule == nullptr) schedule = std::make_shared<const Schedule>(lay_out_schedule(plan, key, choice));
  entries_.push_front({key, std::move(choice), schedule});
  if (entries_.size() > kCapacity) entries_.pop_back();
  return schedule;
}

}  // namespace fedpai
