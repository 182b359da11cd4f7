// SPDX-License-Identifier: Apache-2.0
// Times both walks of the convolution on the layers of ResNet18 and VGG19, in turns. Build and run: see README.md.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "cpu/conv2d/conv2d.h"
#include "cpu/dispatch.h"
#include "memory/block_cache.h"

using namespace fedpai;

namespace {

struct Layer {
  std::int64_t in, out, image, kernel, stride;
};

constexpr Layer kLayers[] = {{3, 64, 32, 3, 1},    {64, 64, 32, 3, 1},   {64, 128, 32, 3, 2}, {64, 128, 32, 1, 2},
                             {128, 128, 16, 3, 1}, {256, 256, 8, 3, 1},  {256, 512, 8, 1, 2}, {512, 512, 4, 3, 1},
                             {512, 512, 2, 3, 1}};
constexpr double kDensities[] = {0.01, 0.02, 0.05, 0.1, 0.25};
constexpr int kRounds = 15;

double milliseconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// Images in batch-last storage, in the kind of memory that the package's tensors have.
Images<float> images(std::int64_t channels, std::int64_t size, std::int64_t batch) {
  const auto count = static_cast<std::size_t>(channels * size * size * batch);
  auto* const data = static_cast<float*>(block_cache().allocate(count * sizeof(float)).data);
  for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<float>(i % 7) - 3.0F;
  return {data, 1, size * size * batch, size * batch, batch};
}

Images<const float> read(const Images<float>& i) { return {i.data, i.batch, i.channel, i.row, i.column}; }

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::int64_t batch = argc > 2 ? std::atoll(argv[2]) : 64;
  std::puts("in,out,image,kernel,stride,density,direction,tiled_ms,streamed_ms,chosen");
  for (const Layer& l : kLayers) {
    const std::int64_t pad = l.kernel / 2, out = (l.image + 2 * pad - l.kernel) / l.stride + 1;
    const Conv2dGeometry geometry{batch, l.image, l.image, out, out, l.stride, l.stride, pad, pad, 1, 1};
    const Images<float> x = images(l.in, l.image, batch), dx = images(l.in, l.image, batch), y = images(l.out, out, batch);
    for (const double density : kDensities) {
      std::mt19937 random(1);
      std::bernoulli_distribution kept(density);
      std::vector<std::uint8_t> mask(static_cast<std::size_t>(l.out * l.in * l.kernel * l.kernel));
      for (std::uint8_t& m : mask) m = kept(random);
      mask[0] = 1;
      const CompiledPlan plan(mask.data(), {l.out, l.in, l.kernel, l.kernel, 1});
      std::vector<float> values(static_cast<std::size_t>(plan.plan.nnz()), 0.5F), grad(values.size());
      const std::function<void()> directions[] = {
          [&] { conv2d_forward<float>(plan, geometry, read(x), nullptr, values.data(), nullptr, y, threads); },
          [&] { conv2d_input_grad<float>(plan, geometry, read(y), values.data(), dx, threads); },
          [&] { conv2d_weight_grad<float>(plan, geometry, read(x), nullptr, read(y), grad.data(), nullptr, threads); }};
      const auto chosen = [&](Direction direction, const Images<float>& source) {
        const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
        const ScheduleChoice choice = choose_schedule(
            plan.plan, {direction, geometry, kernels.lanes,
                        direction == Direction::kWeightGrad ? kernels.pinned : kernels.accumulators, kernels.panel, sizeof(float), true,
                        {source.channel, source.row, source.column}, Walk::kChoose, 1});
        return choice.streamed() ? "streamed" : "tiled";
      };
      const char* const choices[] = {chosen(Direction::kForward, x), chosen(Direction::kInputGrad, y),
                                     chosen(Direction::kWeightGrad, x)};
      const char* const names[] = {"forward", "input-grad", "weight-grad"};
      for (int d = 0; d < 3; ++d) {
        std::array<double, 2> best{1e9, 1e9};
        for (int round = 0; round <= kRounds; ++round) {
          for (const Walk walk : {Walk::kTiled, Walk::kStreamed}) {
            force_walk(walk);
            const double ms = milliseconds(directions[d]);
            double& least = best[walk == Walk::kTiled ? 0 : 1];
            if (round > 0) least = std::min(least, ms);  // the first round builds the schedules
          }
        }
        std::printf("%ld,%ld,%ld,%ld,%ld,%.2f,%s,%.3f,%.3f,%s\n", static_cast<long>(l.in), static_cast<long>(l.out),
                    static_cast<long>(l.image), static_cast<long>(l.kernel), static_cast<long>(l.stride), density,
                    names[d], best[0], best[1], choices[d]);
        std::fflush(stdout);
      }
    }
  }
}
