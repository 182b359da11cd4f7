// SPDX-License-Identifier: Apache-2.0
// What a tiled forward pass spends on what, found by leaving parts out: the whole; without packing (the patch of the
// first unit serves all); with one small dest for all tiles as well, so that nothing but L1 and the entries is read.
// The variants run in turns. Build and run: see README.md.
#include <time.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/dispatch.h"
#include "memory/block_cache.h"

using namespace fedpai;

namespace {

constexpr int kRounds = 25;
constexpr std::array<const char*, 4> kVariants = {"whole", "no packing", "no packing, one dest", "packing alone"};

double seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

float* images(std::int64_t count) {
  auto* data = static_cast<float*>(block_cache().allocate(static_cast<std::size_t>(count) * sizeof(float)).data);
  std::fill(data, data + count, 0.25f);
  return data;
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t channels = argc > 1 ? std::atoll(argv[1]) : 64, image = argc > 2 ? std::atoll(argv[2]) : 32;
  const double density = argc > 3 ? std::atof(argv[3]) : 0.25;
  const std::int64_t batch = 64, pixels = image * image;
  const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
  std::mt19937 random(1);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(channels * channels * 9));
  for (auto& bit : mask) bit = random() % 100000 < density * 100000;
  const CompiledPlan plan(mask.data(), {channels, channels, 3, 3, 1});
  const Conv2dGeometry geometry{batch, image, image, image, image, 1, 1, 1, 1, 1, 1};
  const VectorShape vector{kernels.lanes, kernels.accumulators, 4};
  const PassAxes axes = forward_axes(plan.plan, geometry);
  const EntryList& list = plan.plan.by_output();
  const TiledPass pass = tiled_pass(axes, list, vector, choose_tiling(tiling_problem(axes, list, batch, vector, false)));

  const Images<const float> source{images(batch * channels * pixels), 1, pixels * batch, image * batch, batch};
  const Images<float> dest{images(batch * channels * pixels), 1, pixels * batch, image * batch, batch};
  const std::int64_t small_row = pass.tiling.tile_columns * pass.lane_group;
  const Images<float> small{dest.data, 1, pass.tiling.tile_rows * small_row, small_row, pass.lane_group};
  const Units units(pass, batch, 1);
  float* const packed = images(UnitMemory<float>(pass, units, dest, batch).size());
  const std::vector<float> values(static_cast<std::size_t>(pass.entries()) + kOffsetsAhead, 0.01f);

  const auto run = [&](std::size_t variant) {
    const double start = seconds();
    const bool packs = variant == 0 || variant == 3, walks = variant != 3, one_dest = variant == 2;
    Unit unit;
    TileArgs<float> args{};
    args.offset = pass.offset.data();
    args.value = values.data();
    for (std::int64_t i = 0; i < units.count; ++i) {
      move_to(unit, i, units, pass, batch, source);
      for (std::int64_t block = 0; block < pass.blocks(); ++block) {
        const TaskRange range = tasks_of(pass, block, 0, channels);
        if (packs) pack_block(pass, kernels, block, unit, source, static_cast<const NormMap<float>*>(nullptr), packed);
        if (!walks) continue;
        args.task = pass.tasks.data() + range.begin;
        args.tasks = range.end - range.begin;
        args.accumulate = block > 0;
        if (!one_dest) {
          walk_tiles(pass, kernels.lanes, unit, packed, dest, static_cast<float*>(nullptr), kernels.tile, args);
          continue;
        }
        std::int64_t run_at[kMaxTileRun];
        run_offsets(pass, kernels.lanes, pass.tiling.tile_columns, pass.lane_group, run_at);
        args.source_row = pass.source_row;
        args.dest_run = run_at;
        args.dest_channel = small.channel;
        args.dest_row = small.row;
        args.dest = small.data;
        for (std::int64_t group = 0; group < unit.groups(pass); ++group) {
          for_each_tile(pass, unit.box, [&](std::int64_t rows, std::int64_t columns, std::int64_t y, std::int64_t x) {
            args.source = packed + group * pass.group + (y - unit.box.y) * pass.source_row + (x - unit.box.x) * pass.lane_group;
            kernels.tile[rows - 1][columns * pass.tiling.blocks - 1](args);
          });
        }
      }
    }
    return seconds() - start;
  };

  std::array<std::vector<double>, kVariants.size()> times;
  for (int round = 0; round < kRounds; ++round) {
    for (std::size_t v = 0; v < kVariants.size(); ++v) times[v].push_back(run(v));
  }
  const double products = 2e-9 * static_cast<double>(plan.plan.nnz() * pixels * batch);
  for (std::size_t v = 0; v < kVariants.size(); ++v) {
    std::sort(times[v].begin(), times[v].end());
    const double median = times[v][kRounds / 2];
    std::printf("%-22s %6.2f ms, least %6.2f", kVariants[v], median * 1e3, times[v].front() * 1e3);
    if (v != 3) std::printf("  %5.1f GFLOP/s", products / median);
    std::puts("");
  }
}
