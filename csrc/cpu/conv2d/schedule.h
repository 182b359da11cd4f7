// SPDX-License-Identifier: Apache-2.0
// A Plan laid out for one geometry, and by which walk each of its passes goes.
//
//   tiled     packs patches of the source into L1 and walks the entries over register tiles of them: each source vector
//             is moved once, then costs half a cycle per FMA. For many entries per source channel.
//   streamed  reads rows of the source where they lie: nothing is moved, and an FMA costs what the cache delivers.
//             For few entries, and only for tensors whose images are adjacent. Both gradients may go by one such walk.
#pragma once

#include <variant>
#include <vector>

#include "cpu/conv2d/stream_schedule.h"
#include "cpu/conv2d/tiled_schedule.h"

namespace fedpai {

// kBackward: both gradients in one streamed walk, or no passes where two walks are better.
enum class Direction { kForward, kInputGrad, kWeightGrad, kBackward };

enum class Walk { kChoose, kTiled, kStreamed };

// What a schedule depends on besides the plan.
struct ScheduleKey {
  Direction direction;
  Conv2dGeometry geometry;
  int lanes;
  int accumulators;  // vectors that a register tile may have,
  int panel;         // and one of all rows of a panel
  std::int64_t element_size;
  bool adjacent;         // both tensors have adjacent images
  SourceStrides source;  // of the tensor that is read through the weights, where `adjacent`; else zeros
  Walk walk;
  int threads;

  bool operator==(const ScheduleKey& o) const {
    return direction == o.direction && geometry == o.geometry && lanes == o.lanes && accumulators == o.accumulators &&
           panel == o.panel && element_size == o.element_size && adjacent == o.adjacent && source == o.source && walk == o.walk &&
           threads == o.threads;
  }
};

// One walk for all passes of a direction: together they write each row of the dest, best while it is in cache.
using Schedule = std::variant<std::vector<TiledPass>, std::vector<StreamPass>>;

// How each pass goes: by tilings, or streamed in blocks of source channels.
struct ScheduleChoice {
  std::vector<Tiling> tilings;
  std::vector<std::int64_t> stream_blocks;

  bool streamed() const { return !stream_blocks.empty(); }
  bool operator==(const ScheduleChoice& o) const {
    return tilings == o.tilings && stream_blocks == o.stream_blocks;
  }
};

ScheduleChoice choose_schedule(const Plan& plan, const ScheduleKey& key);
Schedule lay_out_schedule(const Plan& plan, const ScheduleKey& key, const ScheduleChoice& choice);

// Whether two keys ask for the same schedule as soon as the same is chosen for both: the weight gradient walks the
// entries as the forward pass does, both gradients at once as the input gradient does.
bool may_share(const ScheduleKey& a, const ScheduleKey& b);

// Which walk later schedules use: kChoose, unless a test or an experiment forces one for the whole process. A forced
// streamed walk still gives way where it is impossible.
Walk walk_in_force();
void force_walk(Walk walk);

}  // namespace fedpai
