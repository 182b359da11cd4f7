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
  const std::int64_t block = argc > 4 ? std::atoll(argv[4]) : 1;  // output channels that keep the same weights
  const auto row = static_cast<std::ptrdiff_t>(channels * 9);
  for (std::int64_t o = 0; o < channels; ++o) {
    const auto begin = mask.begin() + o * row;
    if (o % block != 0) std::copy(begin - row, begin, begin);
    else std::for_each(begin, begin + row, [&](auto& bit) { bit = random() % 100000 < density * 100000; });
  }
  const CompiledPlan plan(mask.data(), {channels, channels, 3, 3, 1});
  const Conv2dGeometry geometry{batch, image, image, image, image, 1, 1, 1, 1, 1, 1};
  const VectorShape vector{kernels.lanes, kernels.accumulators, 4, kernels.panel};
  const PassAxes axes = forward_axes(plan.plan, geometry);
  const EntryList& list = plan.plan.by_output();
  const Tiling tiling = choose_tiling(tiling_problem(axes, list, batch, vector, false), list, vector);
  const TiledPass pass = tiled_pass(axes, list, vector, tiling);

  const Images<const float> source{images(batch * channels * pixels), 1, pixels * batch, image * batch, batch};
  const Images<float> dest{images(batch * channels * pixels), 1, pixels * batch, image * batch, batch};
  const std::int64_t small_row = pass.tiling.tile_run * kernels.lanes;
  const Images<float> small{dest.data, 1, pass.tiling.tile_rows * small_row, small_row, kernels.lanes};
  const Units units(pass, batch, 1);
  float* const packed = images(UnitMemory<float>(pass, units, dest, batch).size());
  const std::vector<float> values(static_cast<std::size_t>(pass.values()), 0.01f);

  const auto run = [&](std::size_t variant) {
    const double start = seconds();
    const bool packs = variant == 0 || variant == 3, walks = variant != 3, one_dest = variant == 2;
    Unit unit;
    std::vector<std::int64_t> run_at;
    for (std::int64_t k = 0; k < kMaxTileRun * 64; ++k) run_at.push_back(k * kernels.lanes);
    TileArgs<float> args{};
    args.value = values.data();
    for (std::int64_t i = 0; i < units.count; ++i) {
      move_to(unit, i, units, pass, batch, source);
      for (std::int64_t block = 0; block < pass.blocks(); ++block) {
        if (packs) pack_block(pass, kernels, block, unit, source, static_cast<const NormMap<float>*>(nullptr), packed);
        if (!walks) continue;
        args.accumulate = block > 0;
        walk_tiles(pass, kernels.lanes, unit, packed, dest, static_cast<float*>(nullptr), tasks_of(pass, block, 0, channels),
                   args, [&](int height, const TileStrip& strip, TileArgs<float>& tile) {
                     tile.tiles = strip.tiles;
                     if (one_dest) {
                       tile.dest = small.data;
                       tile.dest_channel = small.channel;
                       tile.dest_row = small.row;
                       tile.dest_run = run_at.data();
                     }
                     kernels.tile[height - 1][strip.rows - 1][strip.run - 1](tile);
                   });
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
