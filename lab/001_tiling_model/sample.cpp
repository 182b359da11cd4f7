// SPDX-License-Identifier: Apache-2.0
// Times random tilings of typical layers on one core; one CSV row each, for fit.py.
// Build and run: see README.md.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"

using namespace fedpai;

namespace {

struct Layer {
  std::int64_t in, out, image, kernel, stride;
  double density;
};

constexpr Layer kLayers[] = {
    {64, 64, 32, 3, 1, .02},   {64, 64, 32, 3, 1, .1},   {64, 64, 32, 3, 1, .3},  {128, 128, 16, 3, 1, .01},
    {128, 128, 16, 3, 1, .02}, {128, 128, 16, 3, 1, .1}, {256, 256, 8, 3, 1, .02}, {256, 256, 8, 3, 1, .2},
    {512, 512, 4, 3, 1, .01},  {512, 512, 4, 3, 1, .1},  {512, 512, 2, 3, 1, .02}, {64, 128, 32, 1, 1, .1},
    {128, 256, 16, 3, 2, .05}, {256, 512, 8, 1, 1, .02}, {3, 64, 32, 3, 1, .5},
};
constexpr std::int64_t kBatch = 64;
constexpr int kRepeats = 4;

// Processor time of this process: other work on the machine then shows in the caches only.
double seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class F>
double fastest(F&& run) {
  double best = 1e9;
  for (int r = 0; r < kRepeats; ++r) {
    const double start = seconds();
    run();
    best = std::min(best, seconds() - start);
  }
  return best;
}

std::int64_t pick(std::mt19937& random, std::initializer_list<std::int64_t> from) {
  return *(from.begin() + random() % from.size());
}

Tiling random_tiling(std::mt19937& random, const Layer& layer, std::int64_t out, int accumulators) {
  Tiling t;
  t.blocks = static_cast<int>(pick(random, {1, 2, 2, 2, 3, 4, 8}));
  t.tile_rows = std::min(out, pick(random, {1, 1, 2, 2, 3, 4}));
  t.tile_rows = std::min<std::int64_t>(t.tile_rows, accumulators / t.blocks);
  t.tile_columns = std::min<std::int64_t>(out, accumulators / (t.tile_rows * t.blocks));
  if (random() % 3 == 0) t.tile_columns = std::max<std::int64_t>(1, t.tile_columns - 1);
  t.patch_rows = std::min((out + t.tile_rows - 1) / t.tile_rows, pick(random, {1, 1, 2, 4, 8}));
  t.patch_columns = std::min((out + t.tile_columns - 1) / t.tile_columns, pick(random, {1, 2, 4, 8}));
  t.channel_block = std::min(layer.in, pick(random, {4, 8, 16, 32, 64, 128, 512}));
  return t;
}

void sample(const Layer& layer, int tilings, std::mt19937& random) {
  const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
  const std::int64_t pad = layer.kernel / 2;
  const std::int64_t out = (layer.image + 2 * pad - layer.kernel) / layer.stride + 1;
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(layer.in * layer.out * layer.kernel * layer.kernel));
  for (auto& bit : mask) bit = random() % 100000 < layer.density * 100000;
  const CompiledPlan plan(mask.data(), {layer.out, layer.in, layer.kernel, layer.kernel, 1});
  const Conv2dGeometry geometry{kBatch, layer.image, layer.image, out, out, layer.stride, layer.stride, pad, pad, 1, 1};
  const VectorShape vector{kernels.lanes, kernels.accumulators, 4};

  std::vector<float> x(static_cast<std::size_t>(kBatch * layer.in * layer.image * layer.image), 0.5f);
  std::vector<float> y(static_cast<std::size_t>(kBatch * layer.out * out * out), 0.25f);
  std::vector<float> values(static_cast<std::size_t>(plan.plan.nnz()), 0.01f), grad(values.size());
  const Images<const float> source{x.data(), 1, layer.image * layer.image * kBatch, layer.image * kBatch, kBatch};
  const Images<float> dest{y.data(), 1, out * out * kBatch, out * kBatch, kBatch};
  const Images<const float> dest_grad{y.data(), 1, out * out * kBatch, out * kBatch, kBatch};

  for (int i = 0; i < tilings; ++i) {
    const Tiling t = random_tiling(random, layer, out, kernels.accumulators);
    for (const bool weight_grad : {false, true}) {
      const TiledPass pass = tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, t);
      const double best = fastest([&] {
        if (weight_grad) {
          run_tiled_grad<float>(pass, kernels, kBatch, source, dest_grad, grad.data(), nullptr, 1);
        } else {
          run_tiled<float>(pass, kernels, kBatch, source, values.data(), nullptr, dest, 1);
        }
      });
      std::printf("%ld,%ld,%ld,%ld,%ld,%ld,%ld,%d,%ld,%ld,%ld,%ld,%ld,%d,%.4f\n", layer.in, layer.out, layer.image, out,
                  layer.kernel, layer.stride, plan.plan.nnz(), t.blocks, t.tile_rows, t.tile_columns, t.patch_rows,
                  t.patch_columns, t.channel_block, weight_grad ? 1 : 0, best * 1e3);
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int tilings = argc > 1 ? std::atoi(argv[1]) : 70;
  std::mt19937 random(1);
  std::puts("in,out,image,out_image,kernel,stride,nnz,blocks,rows,columns,patch_rows,patch_columns,channel_block,grad,ms");
  for (const Layer& layer : kLayers) sample(layer, tilings, random);
}
