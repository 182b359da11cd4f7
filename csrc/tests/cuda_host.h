// SPDX-License-Identifier: Apache-2.0
// Launches of the CUDA convolution on the CPU: the blocks and warps of a grid, one after another.
#pragma once

#include <array>
#include <cstdint>

#include "cuda/conv2d/launch.h"

namespace fedpai::cuda {

template <class T, int V, int P>
void run_gather(const GatherArgs<T>& args, const GatherLaunch& launch) {
  for (std::int32_t client = 0; client < launch.clients; ++client) {
    for (std::int32_t pass = 0; pass < launch.passes; ++pass) {
      for (std::int64_t block = 0; block < launch.blocks; ++block) {
        for (int warp = 0; warp < launch.warps; ++warp) {
          std::array<Record, kWarp> records;
          const GatherWork work = gather_work(args.rows, launch.warps, static_cast<std::uint32_t>(block), warp);
          if (work.rank >= args.rows) continue;
          const std::int32_t row = args.row_order[std::int64_t{pass} * args.rows + work.rank];
          gather_row<T, V, P>(args, HostWarp(), records.data(), row, work.tile, pass, client);
        }
      }
    }
  }
}

template <class T>
void run(const GatherArgs<T>& args, const GatherLaunch& launch) {
  if (launch.strip.images == 1) return run_gather<T, 1, 2>(args, launch);
  if (launch.strip.pixels == 4) return run_gather<T, 4, 4>(args, launch);
  if (launch.strip.pixels == 2) return run_gather<T, 4, 2>(args, launch);
  run_gather<T, 4, 1>(args, launch);
}

template <class T, int V, int P>
void run_reduce(const WeightGradArgs<T>& args, const WeightGradLaunch& launch, std::int64_t groups) {
  for (std::int32_t client = 0; client < launch.clients; ++client) {
    for (std::int32_t split = 0; split < launch.splits; ++split) {
      const SplitRange range = tiles_of_split(static_cast<std::uint32_t>(launch.tiles.count()),
                                              static_cast<std::uint32_t>(launch.splits), static_cast<std::uint32_t>(split));
      for (std::int64_t group = 0; group < groups; ++group) {
        GroupScratch scratch{};
        reduce_group<T, V, P>(args, HostWarp(), &scratch, args.groups[group], range.begin, range.end, split, client);
      }
    }
  }
}

template <class T>
void run(const WeightGradArgs<T>& args, const WeightGradLaunch& launch, std::int64_t groups) {
  if (launch.strip.images == 1) return run_reduce<T, 1, 2>(args, launch, groups);
  if (launch.strip.pixels == 4) return run_reduce<T, 4, 4>(args, launch, groups);
  if (launch.strip.pixels == 2) return run_reduce<T, 4, 2>(args, launch, groups);
  run_reduce<T, 4, 1>(args, launch, groups);
}

// The second pass, of whole blocks: of a few elements more than there are.
inline void run(const FinishArgs& args, const WeightGradLaunch& launch) {
  constexpr std::int64_t behind = 3;
  for (std::int64_t client = 0; client < launch.clients; ++client) {
    for (std::int64_t slot = 0; slot < std::int64_t{args.entry_count} + args.rows + behind; ++slot) add_splits(args, slot, client);
  }
}

}  // namespace fedpai::cuda
