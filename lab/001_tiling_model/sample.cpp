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
#include "memory/block_cache.h"

using namespace fedpai;

namespace {

struct Layer {
  std::int64_t in, out, image, kernel, stride;
  double density;
  std::int64_t batch;
  std::int64_t block = 1;  // output channels that keep the same weights
};

constexpr Layer kLayers[] = {
    {64, 64, 32, 3, 1, .02, 64},   {64, 64, 32, 3, 1, .08, 64},   {64, 64, 32, 3, 1, .23, 64},  {64, 64, 32, 3, 1, .23, 16},
    {128, 128, 16, 3, 1, .02, 64}, {128, 128, 16, 3, 1, .11, 64}, {128, 128, 16, 3, 1, .4, 64}, {128, 128, 16, 3, 1, .11, 16},
    {256, 256, 8, 3, 1, .03, 64},  {256, 256, 8, 3, 1, .2, 64},   {256, 256, 8, 3, 1, .1, 16},  {512, 512, 4, 3, 1, .01, 64},
    {512, 512, 4, 3, 1, .1, 64},   {512, 512, 4, 3, 1, .05, 16},  {512, 512, 2, 3, 1, .02, 64}, {512, 512, 2, 3, 1, .1, 64},
    {64, 128, 32, 1, 1, .3, 64},   {128, 256, 16, 1, 1, .1, 64},  {128, 256, 16, 3, 2, .06, 64}, {64, 128, 32, 3, 2, .16, 64},
    {3, 64, 32, 3, 1, .5, 64},     {256, 512, 1, 1, 1, .1, 64},   {768, 3072, 1, 1, 1, .02, 2048},
    // panels
    {64, 64, 32, 3, 1, .02, 64, 16},   {64, 64, 32, 3, 1, .1, 64, 16},    {64, 64, 32, 3, 1, .5, 64, 16},
    {64, 64, 32, 3, 1, .1, 16, 16},    {128, 128, 16, 3, 1, .02, 64, 16}, {128, 128, 16, 3, 1, .1, 64, 8},
    {128, 128, 16, 3, 1, .5, 64, 16},  {128, 128, 16, 3, 1, .1, 16, 16},  {256, 256, 8, 3, 1, .02, 64, 16},
    {256, 256, 8, 3, 1, .1, 64, 8},    {256, 256, 8, 3, 1, .5, 64, 16},   {512, 512, 4, 3, 1, .02, 64, 16},
    {512, 512, 4, 3, 1, .1, 64, 8},    {512, 512, 4, 3, 1, .1, 16, 16},   {512, 512, 2, 3, 1, .1, 64, 8},
    {64, 128, 32, 3, 2, .1, 64, 16},   {128, 256, 16, 1, 1, .3, 64, 16},  {9, 9, 32, 3, 1, 1, 64, 9},
    {36, 36, 8, 3, 1, 1, 64, 36},      {768, 3072, 1, 1, 1, .1, 2048, 16}, {256, 512, 1, 1, 1, .2, 64, 16},
};
constexpr int kRounds = 6;

// Processor time of this process: other work on the machine then shows in the caches only.
double seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::int64_t pick(std::mt19937& random, std::initializer_list<std::int64_t> from) {
  return *(from.begin() + random() % from.size());
}

Tiling random_tiling(std::mt19937& random, const Layer& layer, std::int64_t out, const Conv2dKernels<float>& kernels,
                     bool weight_grad) {
  Tiling t;
  const std::int64_t vectors = (layer.batch + kernels.lanes - 1) / kernels.lanes;
  t.height = static_cast<int>(std::min<std::int64_t>(layer.block, kMaxPanelHeight));
  t.blocks = static_cast<int>(std::min(vectors, pick(random, {1, 2, 2, 3, 4, 4, 8, 8, layer.image == 1 ? 32 : 8})));
  t.groups = static_cast<int>(std::min((vectors + t.blocks - 1) / t.blocks, pick(random, {1, 1, 2, 4, 8})));
  // A lane group narrower than a cache line, alone, loses always.
  if (t.blocks == 1 && t.groups == 1 && vectors > 1) t.groups = 2;
  t.patch_width = (out + pick(random, {0, 0, 1, 3})) / pick(random, {1, 1, 2, 4});
  t.patch_width = std::clamp<std::int64_t>(t.patch_width, 1, out);
  if (t.height > 1 && weight_grad) {
    t.tile_rows = std::min(out, pick(random, {1, 2, 4, 8}));
    t.tile_run = t.patch_width * t.blocks;
  } else {
    const int accumulators = t.height > 1 ? kernels.panel / t.height : weight_grad ? kernels.pinned : kernels.accumulators;
    t.tile_rows = t.height > 1 ? 1 : std::min(out, pick(random, {1, 1, 2, 2, 3, 4}));
    t.tile_run = std::min(t.patch_width * t.blocks, accumulators / t.tile_rows);
    if (t.height == 1 && random() % 3 == 0) t.tile_run = std::max<std::int64_t>(1, t.tile_run - 1);
    if (t.height > 1) t.strip = pick(random, {1, 1, 4, 16});
  }
  t.patch_rows = std::min((out + t.tile_rows - 1) / t.tile_rows, pick(random, {1, 1, 2, 4, 8}));
  t.channel_block = std::min(layer.in, pick(random, {8, 12, 16, 24, 32, 48, 64, 128, 512}));
  return t;
}

void sample(const Layer& layer, int tilings, std::mt19937& random) {
  const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
  const std::int64_t pad = layer.kernel / 2;
  const std::int64_t out = (layer.image + 2 * pad - layer.kernel) / layer.stride + 1;
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(layer.in * layer.out * layer.kernel * layer.kernel));
  const auto row = static_cast<std::ptrdiff_t>(layer.in * layer.kernel * layer.kernel);
  for (std::int64_t o = 0; o < layer.out; ++o) {
    const auto begin = mask.begin() + o * row;
    if (o % layer.block != 0) std::copy(begin - row, begin, begin);
    else std::for_each(begin, begin + row, [&](auto& bit) { bit = random() % 100000 < layer.density * 100000; });
  }
  const CompiledPlan plan(mask.data(), {layer.out, layer.in, layer.kernel, layer.kernel, 1});
  const Conv2dGeometry geometry{layer.batch, layer.image, layer.image, out, out, layer.stride, layer.stride, pad, pad, 1, 1};
  const VectorShape vector{kernels.lanes, kernels.accumulators, 4, kernels.panel};

  // From where outputs come: memory in large pages.
  const auto images = [](std::int64_t count, float value) {
    auto* data = static_cast<float*>(block_cache().allocate(static_cast<std::size_t>(count) * sizeof(float)).data);
    std::fill(data, data + count, value);
    return data;
  };
  float* const x = images(layer.batch * layer.in * layer.image * layer.image, 0.5f);
  float* const y = images(layer.batch * layer.out * out * out, 0.25f);
  std::vector<float> values(static_cast<std::size_t>(plan.plan.nnz()), 0.01f), grad(values.size());
  const Images<const float> source{x, 1, layer.image * layer.image * layer.batch, layer.image * layer.batch, layer.batch};
  const Images<float> dest{y, 1, out * out * layer.batch, out * layer.batch, layer.batch};
  const Images<const float> dest_grad{y, 1, out * out * layer.batch, out * layer.batch, layer.batch};

  struct Candidate {
    Tiling tiling;
    bool weight_grad;
    TiledPass pass;
    double best;
  };
  std::vector<Candidate> candidates;
  for (int i = 0; i < tilings; ++i) {
    for (const bool weight_grad : {false, true}) {
      const Tiling t = random_tiling(random, layer, out, kernels, weight_grad);
      // Units of more megabytes than a thread should keep.
      if (t.blocks * t.groups * t.channel_block * t.patch_width * t.tile_rows * t.patch_rows > 150000) continue;
      candidates.push_back({t, weight_grad, tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, t), 1e9});
    }
  }
  // Rounds over all of them, so that a machine that slows down for a while does not slow down some.
  for (int round = 0; round < kRounds; ++round) {
    for (Candidate& c : candidates) {
      const double start = seconds();
      if (c.weight_grad) {
        run_tiled_grad<float>(c.pass, kernels, layer.batch, source, nullptr, dest_grad, grad.data(), nullptr, 1);
      } else {
        run_tiled<float>(c.pass, kernels, layer.batch, source, nullptr, values.data(), nullptr, dest, 1);
      }
      c.best = std::min(c.best, seconds() - start);
    }
  }
  for (const Candidate& c : candidates) {
    const Tiling& t = c.tiling;
    std::printf("%ld,%ld,%ld,%ld,%ld,%ld,%ld,%ld,%d,%d,%d,%ld,%ld,%ld,%ld,%ld,%ld,%d,%.4f\n", layer.batch, layer.in, layer.out,
                layer.image, out, layer.kernel, layer.stride, plan.plan.nnz(), t.height, t.groups, t.blocks,
                t.tile_rows, t.tile_run, t.patch_rows, t.patch_width, t.channel_block, t.strip, c.weight_grad ? 1 : 0, c.best * 1e3);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int tilings = argc > 1 ? std::atoi(argv[1]) : 70;
  std::mt19937 random(1);
  std::puts("batch,in,out,image,out_image,kernel,stride,nnz,height,groups,blocks,rows,run,patch_rows,patch_width,channel_block,strip,grad,ms");
  for (const Layer& layer : kLayers) sample(layer, tilings, random);
}
