// SPDX-License-Identifier: Apache-2.0
// How a convolution is laid out: whatever is chosen gives the same result, and the choices themselves are sensible.
#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "conv2d_operands.h"
#include "cpu/conv2d/partition.h"
#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"

using namespace fedpai;
using namespace fedpai::tests;

// Few non-zeros per channel are streamed, many are tiled; and what cannot be streamed is tiled.
FEDPAI_SUITE(walk_choice) {
  const auto walk_of = [](int kept_of_100, bool adjacent) {
    const WeightShape shape{64, 64, 3, 3, 1};
    std::vector<std::uint8_t> mask(64 * 64 * 9);
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<int>(i * 37 % 100) < kept_of_100;
    const Plan plan(mask.data(), shape);
    const Conv2dGeometry geometry{64, 32, 32, 32, 32, 1, 1, 1, 1, 1, 1};
    const SourceStrides strides{32 * 32 * 64, 32 * 64, 64};
    const ScheduleChoice choice =
        choose_schedule(plan, {Direction::kForward, geometry, 8, 14, 12, 4, adjacent, strides, Walk::kChoose, 1});
    return choice.streamed() ? Walk::kStreamed : Walk::kTiled;
  };
  begin_case("by density");
  CHECK(walk_of(1, true) == Walk::kStreamed, "1 %");
  CHECK(walk_of(40, true) == Walk::kTiled, "40 %");
  begin_case("images that are not adjacent");
  CHECK(walk_of(1, false) == Walk::kTiled, "");
}

// Whatever a cost model may choose gives the same: tilings that it would never try among them.
FEDPAI_SUITE(tilings) {
  Random random(3);
  const auto pick = [&](std::initializer_list<std::int64_t> from) {
    return from.begin()[static_cast<std::size_t>(random.uniform() * static_cast<double>(from.size()))];
  };
  const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
  for (int round = 0; round < 150; ++round) {
    ConvCase c{"", pick({1, 7, 31, 40, 97}), pick({1, 3, 9}), pick({1, 5, 12}), pick({3, 8, 11}), pick({2, 7}), 3, 3};
    c.pad_h = c.pad_w = 1;
    c.stride_h = pick({1, 1, 2});
    c.block_rows = pick({1, 1, 4, 5}), c.block_columns = pick({1, 3, 8});
    c.lost = c.block_rows > 1 ? 0.1 * static_cast<double>(pick({0, 0, 1})) : 0.0;
    const ConvData data = make_data(c, static_cast<std::uint64_t>(round));
    const ConvResult expected = reference(c, data);
    const CompiledPlan plan(data.mask.data(), shape_of(c));
    const Conv2dGeometry geometry = geometry_of(c);
    const Layout layout = pick({0, 0, 1}) == 0 ? Layout::kBatchLast : Layout::kBatchFirst;
    const int threads = static_cast<int>(pick({1, 2, 3}));
    const auto any_tiling = [&](bool weight_grad) {
      Tiling t;
      t.height = static_cast<int>(pick({1, 2, 3, 4}));
      const int accumulators = t.height > 1 ? kernels.panel / t.height : weight_grad ? kernels.pinned : kernels.accumulators;
      t.blocks = static_cast<int>(pick({1, 2, 3, 5}));
      t.groups = static_cast<int>(pick({1, 2, 3, 8}));
      t.tile_rows = pick({1, 2});
      t.tile_run = std::max<std::int64_t>(1, std::min(pick({1, 2, 3, 5, 12}), accumulators / t.tile_rows));
      if (t.height > 1 && weight_grad) t.tile_run = pick({1, 4, 50});
      t.patch_rows = pick({1, 2, 8});
      t.patch_width = pick({1, 3, 7});
      t.channel_block = pick({1, 2, c.in_channels});
      return t;
    };
    const Tiling sums = any_tiling(false), grads = any_tiling(true);
    const auto words = [](const Tiling& t) {
      return " height=" + std::to_string(t.height) + " groups=" + std::to_string(t.groups) + " blocks=" + std::to_string(t.blocks) + " channel_block=" +
             std::to_string(t.channel_block);
    };
    begin_case("round " + std::to_string(round) + " batch=" + std::to_string(c.batch) + " " + name_of(layout) +
               " threads=" + std::to_string(threads) + words(sums) + words(grads));

    Operands<float> o(c, data, layout);
    const Tensor<float>&x = o.x, &grad_y = o.grad_y;
    const VectorShape vector{kernels.lanes, kernels.accumulators, sizeof(float)};
    run_tiled<float>(tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, sums), kernels, c.batch,
                     x.images(), nullptr, o.values.data(), o.bias.data(), o.y.images(), threads);
    for (const PassAxes& axes : input_grad_axes(plan.plan, geometry)) {
      run_tiled<float>(tiled_pass(axes, plan.plan.by_input(), vector, sums), kernels, c.batch, grad_y.images(),
                       nullptr, o.values.data(), nullptr, o.grad_x.images(), threads);
    }
    std::fill(o.grad_values.begin(), o.grad_values.end(), 0.0F);  // taps that only ever read padding are in no pass
    run_tiled_grad<float>(tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, grads), kernels,
                          c.batch, x.images(), nullptr, grad_y.images(), o.grad_values.data(), o.grad_bias.data(), threads);
    expect_equal("y", o.y, expected.y);
    expect_equal("grad_x", o.grad_x, expected.grad_x);
    expect_equal("grad_values", o.grad_values, packed<float>(expected.grad_w, data.mask));
    expect_equal("grad_bias", o.grad_bias, vector_of<float>(expected.grad_bias));
  }
}

// A register tile's window stays in a first-level cache of 64 sets of 8 lines if it is no larger than that: 22 channels of
// 5 x 4 pixels of 16 images, which the packed patch has 144 lines apart, would meet in some sets eleven times.
FEDPAI_SUITE(patches_spread) {
  const WeightShape shape{64, 64, 3, 3, 1};
  const std::vector<std::uint8_t> mask(64 * 64 * 9, 1);
  const Plan plan(mask.data(), shape);
  const Conv2dGeometry geometry{64, 32, 32, 32, 32, 1, 1, 1, 1, 1, 1};
  Tiling tiling;
  tiling.blocks = 2, tiling.groups = 4, tiling.tile_rows = 3, tiling.tile_run = 4;
  tiling.patch_rows = 2, tiling.patch_width = 16, tiling.channel_block = 22;
  const TiledPass pass = tiled_pass(forward_axes(plan, geometry), plan.by_output(), {8, 14, 4}, tiling);
  const auto most_in_a_set = [&](std::int64_t plane) {
    std::vector<int> held(64);
    for (std::int64_t c = 0; c < 22; ++c) {
      for (std::int64_t y = 0; y < 5; ++y) {
        for (std::int64_t x = 0; x < 4; ++x) {
          ++held[static_cast<std::size_t>((c * plane + y * pass.source_row + x * pass.lane_group) / 16 % 64)];
        }
      }
    }
    return *std::max_element(held.begin(), held.end());
  };
  begin_case("no spread");
  CHECK(most_in_a_set(pass.y.slots * pass.source_row) > 8, "the case shows nothing");
  begin_case("spread");
  CHECK(pass.plane >= pass.y.slots * pass.source_row && pass.plane <= pass.y.slots * pass.source_row + 15 * 16, "distance");
  CHECK(most_in_a_set(pass.plane) <= 8, "crowded");
}

// A choice is always possible to run, and no unit of it is larger than a thread should keep.
FEDPAI_SUITE(tiling_choice) {
  for (const std::int64_t batch : {1, 100, 100000}) {
    for (const std::int64_t channels : {0, 1, 600, 100000}) {
      for (const std::int64_t size : {1, 5, 64}) {
        for (const bool weight_grad : {false, true}) {
          const std::int64_t halo = size > 1 ? 2 : 0;
          const TilingProblem problem{size, size, halo, halo, 1, 1, batch, 64, channels, channels * 7, 4, 8, 12,
                                      weight_grad, true};
          const Tiling t = choose_tiling(problem);
          begin_case(std::to_string(batch) + " images of " + std::to_string(size) + ", " + std::to_string(channels) +
                     " channels");
          CHECK(t.cycles >= 0 && t.cycles < 1e30, "cycles");
          CHECK(t.tile_rows * t.tile_run <= 12, "the tile does not fit the registers");
          CHECK(t.groups >= 1 && (t.groups - 1) * t.blocks * 8 < batch, "groups without images");
          const double pixels = static_cast<double>(std::min(size, t.tile_rows * t.patch_rows) *
                                                    std::min(size, t.patch_width));
          const double bytes = pixels * 32.0 * static_cast<double>(t.blocks * t.groups * t.channel_block);
          CHECK(t.groups == 1 || bytes <= 4e6, "a unit of " + std::to_string(bytes) + " bytes");
        }
      }
    }
  }
}

// Where the images and pixels can be shared evenly, threads do not all pack everything, nor does one wait for long for
// another's last unit.
FEDPAI_SUITE(tiling_threads) {
  for (const std::int64_t size : {2, 4, 8, 16, 32}) {
    for (const int threads : {2, 4}) {
      for (const bool weight_grad : {false, true}) {
        TilingProblem problem{size, size, 2, 2, 1, 1, 64, 256, 256, 256 * 46, 4, 8, 12, weight_grad, true};
        problem.threads = threads;
        problem.height = 4;
        problem.panels[3] = 64;
        problem.panel_entries[3] = 64 * 46;
        const Tiling t = choose_tiling(problem);
        const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
        const std::int64_t boxes =
            ceil_div(ceil_div(size, t.tile_rows), t.patch_rows) * ceil_div(size, t.patch_width);
        const std::int64_t groups = ceil_div(64, t.blocks * 8);
        const std::int64_t together = groups_per_unit(t.groups, groups, boxes, threads);
        const std::int64_t units = boxes * ceil_div(groups, together);
        begin_case(std::to_string(size) + " pixels, " + std::to_string(threads) + " threads");
        CHECK(units >= threads, std::to_string(units) + " units");
        const double share = static_cast<double>(units) / static_cast<double>(threads);
        CHECK(std::ceil(share) <= 1.5 * share, std::to_string(units) + " units");
      }
    }
  }
}

// The forward pass and the weight gradient of one image size have one schedule between them where they would go alike.
// Both gradients go by one walk where few entries are kept, and threads find channels enough to divide.
FEDPAI_SUITE(backward_chosen) {
  const Conv2dGeometry geometry{64, 32, 32, 32, 32, 1, 1, 1, 1, 1, 1};
  const auto goes_by_one_walk = [&](double density, int threads, bool adjacent) {
    begin_case("density " + std::to_string(density) + " threads " + std::to_string(threads));
    std::vector<std::uint8_t> mask(64 * 64 * 9);
    Random random(5);
    for (std::uint8_t& bit : mask) bit = random.uniform() < density;
    const CompiledPlan plan(mask.data(), {64, 64, 3, 3, 1});
    const SourceStrides strides = adjacent ? SourceStrides{32 * 32 * 64, 32 * 64, 64} : SourceStrides{0, 0, 0};
    const ScheduleKey key{Direction::kBackward, geometry, 16, 28, 12, 4, adjacent, strides, Walk::kChoose, threads};
    return choose_schedule(plan.plan, key).streamed();
  };
  CHECK(goes_by_one_walk(0.02, 2, true), "few entries");
  CHECK(goes_by_one_walk(0.02, 32, true), "just enough channels");
  CHECK(!goes_by_one_walk(0.02, 33, true), "too few channels");
  CHECK(!goes_by_one_walk(0.9, 2, true), "many entries");
  CHECK(!goes_by_one_walk(0.02, 2, false), "images that are not adjacent");
}

FEDPAI_SUITE(schedules_shared) {
  std::vector<std::uint8_t> mask(64 * 64 * 9);
  Random random(5);
  for (std::uint8_t& bit : mask) bit = random.uniform() < 0.02;
  const CompiledPlan plan(mask.data(), {64, 64, 3, 3, 1});
  const Conv2dGeometry geometry{64, 8, 8, 8, 8, 1, 1, 1, 1, 1, 1};
  const auto key = [&](Direction direction, Walk walk, const Conv2dGeometry& g) {
    const SourceStrides strides{g.in_h * g.in_w * 64, g.in_w * 64, 64};
    return ScheduleKey{direction, g, 8, 12, 12, 4, true, strides, walk, 1};
  };
  for (const Walk walk : {Walk::kTiled, Walk::kStreamed}) {
    begin_case(walk == Walk::kTiled ? "tiled" : "streamed");
    const ScheduleKey forward = key(Direction::kForward, walk, geometry);
    const ScheduleKey weight_grad = key(Direction::kWeightGrad, walk, geometry);
    const bool alike = choose_schedule(plan.plan, forward) == choose_schedule(plan.plan, weight_grad);
    const auto schedule = plan.schedules.get(plan.plan, forward);
    CHECK(alike == (plan.schedules.get(plan.plan, weight_grad) == schedule), "weight gradient");
    CHECK(alike, "chosen alike");
    const auto input_grad = plan.schedules.get(plan.plan, key(Direction::kInputGrad, walk, geometry));
    CHECK(input_grad != schedule, "input gradient");
    const auto both = plan.schedules.get(plan.plan, key(Direction::kBackward, walk, geometry));
    if (walk == Walk::kStreamed) CHECK(both == input_grad, "both gradients go as the input gradient does");
    else CHECK(std::get<std::vector<TiledPass>>(*both).empty(), "no walk does both by tiles");
    Conv2dGeometry larger = geometry;
    larger.in_h = larger.out_h = 9;
    CHECK(plan.schedules.get(plan.plan, key(Direction::kWeightGrad, walk, larger)) != schedule, "another image");
  }
}
