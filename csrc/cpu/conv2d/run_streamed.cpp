// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/run.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/conv2d/scratch.h"
#include "cpu/conv2d/stream_walk.h"

namespace fedpai {

namespace {

// What the threads share of one pass.
template <class T>
struct StreamJob {
  const StreamPass* pass;
  Rectangles<const T, T> rectangles;
  const T* values;                 // in walking order
  std::vector<std::int64_t> cuts;  // dest channels of each part
  bool past_caches;                // lines of the dest are stored once, by one thread, whole
};

// The dest channels of one part, in one band of rows of one lane block.
template <class T>
void accumulate_band(const StreamJob<T>& job, const Conv2dKernels<T>& kernels, const T* bias, ZoneEntries<T>& entries,
                     std::size_t part, std::int64_t band, std::int64_t lane_block) {
  for (std::int64_t block = 0; block < job.pass->blocks; ++block) {
    for (std::int64_t c = job.cuts[part]; c < job.cuts[part + 1]; ++c) {
      for_each_zone(*job.pass, band, [&](const StreamZone& y, const StreamZone& x) {
        const EntryRun<T> run = entries.of(block, c, y, x);
        kernels.stream.accumulate({job.rectangles.shape(lane_block, y.end - y.begin, x),
                                   job.rectangles.source(lane_block, y.begin, x.begin), run.offset, run.value,
                                   run.count, job.rectangles.dest(c, lane_block, y.begin, x.begin),
                                   bias != nullptr ? bias[c] : T(0), block > 0, job.past_caches});
      });
    }
  }
}

}  // namespace

template <class T>
void run_streamed(const std::vector<StreamPass>& passes, const Conv2dKernels<T>& kernels, std::int64_t batch,
                  const Images<const T>& source, const T* values, const T* bias, const Images<T>& dest, int threads) {
  std::int64_t entries = 0, bands = 0;
  for (const StreamPass& pass : passes) {
    entries += pass.entries();
    bands = std::max(bands, bands_of(pass));
  }
  static thread_local Scratch scratch;
  T* buffer = static_cast<T*>(scratch.reserve(sizeof(T) * static_cast<std::size_t>(entries)));

  std::vector<StreamJob<T>> jobs;
  for (const StreamPass& pass : passes) {
    const Rectangles<const T, T> rectangles(pass, batch, source, dest);
    const std::int64_t places = bands * rectangles.lane_blocks();
    const std::int64_t wanted = threads == 1 ? 1 : kUnitsPerThread * threads;
    jobs.push_back({&pass, rectangles, ordered_values(pass.order, pass.order_is_identity, values, buffer, threads),
                    cut_channels(pass, (wanted + places - 1) / places),
                    stores_past_caches(pass, batch, dest)});
    buffer += pass.entries();
  }
  const auto parts = static_cast<std::int64_t>(jobs.front().cuts.size()) - 1;
  const std::int64_t lane_blocks = jobs.front().rectangles.lane_blocks();

#pragma omp parallel num_threads(threads)
  {
    std::vector<ZoneEntries<T>> zone_entries;
    for (const StreamJob<T>& job : jobs) zone_entries.emplace_back(*job.pass, job.values, false);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t unit = 0; unit < bands * lane_blocks * parts; ++unit) {
      const auto part = static_cast<std::size_t>(unit % parts);
      const std::int64_t band = unit / parts % bands;
      const std::int64_t lane_block = unit / parts / bands;
      for (std::size_t p = 0; p < jobs.size(); ++p) {
        accumulate_band(jobs[p], kernels, bias, zone_entries[p], part, band, lane_block);
      }
    }
  }
}

template <class T>
void run_streamed_grad(const StreamPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch,
                       const Images<const T>& x, const Images<const T>& dy, T* values_grad, T* bias_grad, int threads) {
  const std::int64_t lanes = kernels.lanes;
  const std::int64_t sums_size = aligned_elements<T>(pass.entries() * lanes);
  const std::int64_t bias_size = bias_grad != nullptr ? pass.dest_channels * lanes : 0;
  static thread_local Scratch scratch;
  T* const sums = static_cast<T*>(scratch.reserve(sizeof(T) * static_cast<std::size_t>(sums_size + bias_size)));
  T* const bias_sums = sums + sums_size;

  const Rectangles<const T, const T> rectangles(pass, batch, x, dy);
  // Each part has dest channels of its own, hence sums of its own: the result does not depend on who computes it when.
  const std::vector<std::int64_t> cuts = cut_channels(pass, threads == 1 ? 1 : kUnitsPerThread * threads);
  const auto parts = static_cast<std::int64_t>(cuts.size()) - 1;
  const std::int32_t* const order = pass.order_is_identity ? nullptr : pass.order.data();

#pragma omp parallel num_threads(threads)
  {
    ZoneEntries<T> entries(pass, nullptr, true);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t first = cuts[static_cast<std::size_t>(part)], last = cuts[static_cast<std::size_t>(part) + 1];
      if (bias_grad != nullptr) std::fill(bias_sums + first * lanes, bias_sums + last * lanes, T(0));
      for (std::int64_t block = 0; block < pass.blocks; ++block) {
        const std::int64_t entry_begin = pass.piece(block, first, 0, 0), entry_end = pass.piece(block, last, 0, 0);
        std::fill(sums + entry_begin * lanes, sums + entry_end * lanes, T(0));
        T* const block_bias_sums = block == 0 && bias_grad != nullptr ? bias_sums : nullptr;
        for (std::int64_t lane_block = 0; lane_block < rectangles.lane_blocks(); ++lane_block) {
          for (std::int64_t band = 0; band < bands_of(pass); ++band) {
            for (std::int64_t c = first; c < last; ++c) {
              for_each_zone(pass, band, [&](const StreamZone& zone_y, const StreamZone& zone_x) {
                const EntryRun<T> run = entries.of(block, c, zone_y, zone_x);
                kernels.stream.weight_grad({rectangles.shape(lane_block, zone_y.end - zone_y.begin, zone_x),
                                            rectangles.source(lane_block, zone_y.begin, zone_x.begin), run.offset,
                                            run.entry, run.count,
                                            rectangles.dest(c, lane_block, zone_y.begin, zone_x.begin),
                                            sums + run.first * lanes,
                                            block_bias_sums != nullptr ? block_bias_sums + c * lanes : nullptr});
              });
            }
          }
        }
        kernels.reduce(sums, 1, 0, order, entry_begin, entry_end, values_grad);
      }
    }
  }
  if (bias_grad != nullptr) kernels.reduce(bias_sums, 1, 0, nullptr, 0, pass.dest_channels, bias_grad);
}

#define FEDPAI_INSTANTIATE(T)                                                                                         \
  template void run_streamed<T>(const std::vector<StreamPass>&, const Conv2dKernels<T>&, std::int64_t,               \
                                const Images<const T>&, const T*, const T*, const Images<T>&, int);                \
  template void run_streamed_grad<T>(const StreamPass&, const Conv2dKernels<T>&, std::int64_t, const Images<const T>&, \
                                     const Images<const T>&, T*, T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)

}  // namespace fedpai
