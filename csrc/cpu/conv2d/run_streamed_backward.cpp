// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/run.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/conv2d/scratch.h"
#include "cpu/conv2d/stream_walk.h"
#include "cpu/dispatch.h"

namespace fedpai {

namespace {

// What the threads share of one pass.
template <class T>
struct BackwardJob {
  const StreamPass* pass;
  Rectangles<const T, T> rectangles;  // of dy and dx
  const T *x, *dx;                    // where they begin
  std::int64_t x_row;                 // elements from one row of x to the next
  const NormMap<T>* norm;             // of x, to be applied on the way; or null
  const T* values;                    // in walking order
  T* sums;                            // [entry][lane]
  std::vector<std::int64_t> cuts;     // input channels of each part
  bool past_caches;
};

// A channel of x in one band of rows, as it meets dy: `data` lies as dx does from `dx` on.
template <class T>
struct InputBand {
  const T *data, *dx;
};

template <class T>
InputBand<T> input_band(const BackwardJob<T>& job, std::int64_t channel, std::int64_t band, Scratch& scratch) {
  if (job.norm == nullptr) return {job.x, job.dx};
  const std::int64_t first = band * kBandRows;
  const std::int64_t count = (std::min(job.pass->axes.y.grid, first + kBandRows) - first) * job.x_row;
  const T* const dx = job.rectangles.dest(channel, 0, first, 0);
  T* const normalised = static_cast<T*>(scratch.reserve(sizeof(T) * static_cast<std::size_t>(count)));
  const Activation activation = job.norm->activation;
  norm_kernels<T>().apply[activation.kind](job.x + (dx - job.dx), normalised, count, job.norm->channel[channel],
                                           static_cast<T>(activation.slope));
  return {normalised, dx};
}

// The input channels of one part, in one band of rows of one lane block.
template <class T>
void backward_band(const BackwardJob<T>& job, const Conv2dKernels<T>& kernels, ZoneEntries<T>& entries, std::size_t part,
                   std::int64_t band, std::int64_t lane_block) {
  static thread_local Scratch scratch;
  for (std::int64_t block = 0; block < job.pass->blocks; ++block) {
    for (std::int64_t c = job.cuts[part]; c < job.cuts[part + 1]; ++c) {
      const InputBand<T> input = input_band(job, c, band, scratch);
      for_each_zone(*job.pass, band, [&](const StreamZone& y, const StreamZone& x) {
        const EntryRun<T> run = entries.of(block, c, y, x);
        T* const dest = job.rectangles.dest(c, lane_block, y.begin, x.begin);
        kernels.stream.backward({job.rectangles.shape(lane_block, y.end - y.begin, x),
                                 job.rectangles.source(lane_block, y.begin, x.begin), run.offset, run.value, run.entry,
                                 run.count, input.data + (dest - input.dx), dest, job.sums + run.first * kernels.lanes,
                                 block > 0, job.past_caches});
      });
    }
  }
}

// visit(first, last) for the entries of one part, which are neighbours in each block.
template <class F>
void for_each_range(const StreamPass& pass, std::int64_t first, std::int64_t last, F&& visit) {
  for (std::int64_t block = 0; block < pass.blocks; ++block) visit(pass.piece(block, first, 0, 0), pass.piece(block, last, 0, 0));
}

}  // namespace

bool normalises_bands(const std::vector<StreamPass>& passes, std::int64_t batch) {
  return passes.size() == 1 && passes.front().blocks == 1 && batch <= kLaneBlock;
}

template <class T>
void run_streamed_backward(const std::vector<StreamPass>& passes, const Conv2dKernels<T>& kernels, std::int64_t batch,
                           const Images<const T>& x, const NormMap<T>* norm, const Images<const T>& dy, const T* values,
                           const Images<T>& dx, T* values_grad, int threads) {
  std::int64_t entries = 0, bands = 0;
  for (const StreamPass& pass : passes) {
    entries += pass.entries();
    bands = std::max(bands, bands_of(pass));
  }
  const std::int64_t lanes = kernels.lanes;
  static thread_local Scratch scratch;
  T* sums = static_cast<T*>(scratch.reserve(sizeof(T) * static_cast<std::size_t>(entries * (lanes + 1))));
  T* ordered = sums + entries * lanes;

  std::vector<BackwardJob<T>> jobs;
  for (const StreamPass& pass : passes) {
    jobs.push_back({&pass, Rectangles<const T, T>(pass, batch, dy, dx),
                    x.data, dx.data, x.row, norm,
                    ordered_values(pass.order, pass.order_is_identity, values, ordered, threads), sums,
                    cut_channels(pass, threads == 1 ? 1 : kUnitsPerThread * threads),
                    stores_past_caches(pass, batch, dx)});
    sums += pass.entries() * lanes;
    ordered += pass.entries();
  }
  const auto parts = static_cast<std::int64_t>(jobs.front().cuts.size()) - 1;
  const std::int64_t lane_blocks = jobs.front().rectangles.lane_blocks();

#pragma omp parallel num_threads(threads)
  {
    std::vector<ZoneEntries<T>> zone_entries;
    for (const BackwardJob<T>& job : jobs) zone_entries.emplace_back(*job.pass, job.values, true);
    // Each part has input channels of its own, hence sums of its own: the result does not depend on who computes it when.
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t unit = 0; unit < parts; ++unit) {
      const auto part = static_cast<std::size_t>(unit);
      for (const BackwardJob<T>& job : jobs) {
        for_each_range(*job.pass, job.cuts[part], job.cuts[part + 1], [&](std::int64_t first, std::int64_t last) {
          std::fill(job.sums + first * lanes, job.sums + last * lanes, T(0));
        });
      }
      for (std::int64_t lane_block = 0; lane_block < lane_blocks; ++lane_block) {
        for (std::int64_t band = 0; band < bands; ++band) {
          for (std::size_t p = 0; p < jobs.size(); ++p) {
            backward_band(jobs[p], kernels, zone_entries[p], part, band, lane_block);
          }
        }
      }
      for (const BackwardJob<T>& job : jobs) {
        const std::int32_t* const order = job.pass->order_is_identity ? nullptr : job.pass->order.data();
        for_each_range(*job.pass, job.cuts[part], job.cuts[part + 1], [&](std::int64_t first, std::int64_t last) {
          kernels.reduce(job.sums, 1, 0, order, first, last, values_grad);
        });
      }
    }
  }
}

template <class T>
void sum_channels(const Conv2dGeometry& g, std::int64_t channels, const Conv2dKernels<T>& kernels,
                  const Images<const T>& dy, T* bias_grad, int threads) {
  const std::int64_t lanes = kernels.lanes;
  static thread_local Scratch scratch;
  T* const sums = static_cast<T*>(scratch.reserve(sizeof(T) * static_cast<std::size_t>(channels * lanes)));
  const bool joins = dy.column == g.batch;
  const StreamShape shape{g.out_h, 0, dy.row, joins ? 1 : g.out_w, 0, joins ? 0 : dy.column, joins ? g.out_w * g.batch : g.batch};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t c = 0; c < channels; ++c) {
    std::fill(sums + c * lanes, sums + (c + 1) * lanes, T(0));
    kernels.stream.weight_grad({shape, nullptr, nullptr, nullptr, 0, dy.data + c * dy.channel, nullptr, sums + c * lanes});
  }
  kernels.reduce(sums, 1, 0, nullptr, 0, channels, bias_grad);
}

#define FEDPAI_INSTANTIATE(T)                                                                                         \
  template void run_streamed_backward<T>(const std::vector<StreamPass>&, const Conv2dKernels<T>&, std::int64_t,       \
                                         const Images<const T>&, const NormMap<T>*, const Images<const T>&, const T*, \
                                         const Images<T>&, T*, int);                                                                   \
  template void sum_channels<T>(const Conv2dGeometry&, std::int64_t, const Conv2dKernels<T>&, const Images<const T>&, \
                                T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)

}  // namespace fedpai
