// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/run.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/conv2d/scratch.h"

namespace fedpai {

namespace {

// Adds one unit's products to the sums of channel block `block`.
template <class T>
void grad_unit(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t block, const TaskRange& range,
               const PatchBox& box, const std::vector<PackSegment>& segments, std::int64_t first_image, int lanes_valid,
               const Images<const T>& x, const Images<const T>& dy, T* sums, T* bias_sums, T* packed,
               T* staging) {
  pack_block(pass, kernels, block, x, first_image, lanes_valid, segments, packed);

  const bool in_place = dy.batch == 1 && lanes_valid == pass.lane_group;
  const DestView<const T> target = dest_in_place(pass, dy, first_image);
  const DestView<const T> view =
      in_place ? target : dest_staged<const T>(pass, box, staging);
  if (!in_place) {
    std::vector<PackSegment> rows;
    for (std::int64_t y = 0; y < box.height; ++y) {
      rows.push_back({y * view.row, (box.y + y) * dy.row + box.x * dy.column, dy.column, 0,
                      static_cast<std::int32_t>(box.width), 0});
    }
    PackArgs<T> args{};
    args.source = target.origin;
    args.source_channel = dy.channel;
    args.source_lane = dy.batch;
    args.channel_count = pass.dest_channels;
    args.segments = rows.data();
    args.segment_count = static_cast<std::int64_t>(rows.size());
    args.packed = staging;
    args.plane = view.channel;
    args.blocks = pass.tiling.blocks;
    args.lanes_valid = lanes_valid;
    kernels.pack(args);
  }

  std::int64_t dest_run[kMaxTileRun];
  run_offsets(pass, kernels.lanes, pass.tiling.tile_columns, view.column, dest_run);
  GradTileArgs<T> args{};
  args.source_row = pass.source_row;
  args.offset = pass.offset.data();
  args.task = pass.tasks.data() + range.begin;
  args.tasks = range.end - range.begin;
  args.dest_channel = view.channel;
  args.dest_row = view.row;
  args.dest_run = dest_run;
  args.sums = sums;
  args.bias_sums = block == 0 ? bias_sums : nullptr;
  for_each_tile(pass, box, [&](std::int64_t rows, std::int64_t columns, std::int64_t y, std::int64_t x_pixel) {
    args.source = packed + (y - box.y) * pass.source_row + (x_pixel - box.x) * pass.lane_group;
    args.dest = view.origin + y * view.row + x_pixel * view.column;
    kernels.grad_tile[rows - 1][columns * pass.tiling.blocks - 1](args);
  });
}

}  // namespace

template <class T>
void run_tiled_grad(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& x,
                     const Images<const T>& dy, T* values_grad, T* bias_grad, int threads) {
  const Units units(pass, batch);
  const std::int64_t lanes = kernels.lanes;
  const std::int64_t entries = pass.entries();

  // Threads share the units, each with sums of its own, or the dest channels, with one set of sums but every thread
  // packing every patch. The first costs an extra pass over the sums per thread, so it is for few non-zeros.
  constexpr std::int64_t kPrivateSumsBytes = 1 << 20;
  const std::int64_t sums_bytes = entries * static_cast<std::int64_t>(sizeof(T));
  const bool share_units = units.count >= threads && (sums_bytes <= kPrivateSumsBytes || pass.dest_channels < threads);
  const std::int64_t parts =
      share_units ? std::min<std::int64_t>(threads, units.count) : std::min<std::int64_t>(threads, pass.dest_channels);
  const std::vector<std::int64_t> cuts = cut_channels(pass, share_units ? 1 : parts);

  const std::int64_t sums_size = aligned_elements<T>(entries);
  const std::int64_t bias_size = bias_grad != nullptr ? aligned_elements<T>(pass.dest_channels * lanes) : 0;
  const std::int64_t sum_sets = share_units ? parts : 1;
  const std::int64_t packed_size = aligned_elements<T>(pass.plane * pass.tiling.channel_block);
  const bool stages = dy.batch != 1 || batch % pass.lane_group != 0;
  const std::int64_t staging_size =
      stages ? aligned_elements<T>(pass.dest_channels * largest_patch_pixels(pass) * pass.lane_group) : 0;
  static thread_local Scratch scratch;
  T* const sums = static_cast<T*>(scratch.reserve(
      sizeof(T) *
      static_cast<std::size_t>(sum_sets * (sums_size + bias_size) + parts * (packed_size + staging_size))));
  T* const bias_sums = sums + sum_sets * sums_size;
  T* const buffers = bias_sums + sum_sets * bias_size;
  std::fill(sums, buffers, T(0));

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (std::int64_t part = 0; part < parts; ++part) {
    T* const packed = buffers + part * (packed_size + staging_size);
    T* const staging = packed + packed_size;
    const std::int64_t set = share_units ? part : 0;
    const std::int64_t first_unit = share_units ? units.count * part / parts : 0;
    const std::int64_t last_unit = share_units ? units.count * (part + 1) / parts : units.count;
    const auto cut = static_cast<std::size_t>(share_units ? 0 : part);
    std::vector<PackSegment> segments;
    // Channel blocks outermost: a block's sums stay in cache while all units pass by.
    for (std::int64_t block = 0; block < pass.blocks(); ++block) {
      const TaskRange range = tasks_of(pass, block, cuts[cut], cuts[cut + 1]);
      if (range.begin == range.end) continue;
      std::int64_t segments_of = -1;
      PatchBox box{};
      for (std::int64_t unit = first_unit; unit < last_unit; ++unit) {
        if (units.patch(unit) != segments_of) {
          segments_of = units.patch(unit);
          box = patch_box(pass, segments_of);
          list_segments(pass, box, x.row, x.column, segments);
        }
        const std::int64_t first_image = units.group(unit) * pass.lane_group;
        const int lanes_valid = static_cast<int>(std::min(pass.lane_group, batch - first_image));
        grad_unit(pass, kernels, block, range, box, segments, first_image, lanes_valid, x, dy,
                  sums + set * sums_size, bias_grad != nullptr ? bias_sums + set * bias_size : nullptr, packed,
                  staging);
      }
    }
  }

#pragma omp parallel for num_threads(threads) schedule(static) if (entries > 65536)
  for (std::int64_t j = 0; j < entries; ++j) {
    T total = sums[j];
    for (std::int64_t set = 1; set < sum_sets; ++set) total += sums[set * sums_size + j];
    values_grad[pass.order[static_cast<std::size_t>(j)]] = total;
  }
  if (bias_grad != nullptr) kernels.reduce(bias_sums, sum_sets, bias_size, nullptr, 0, pass.dest_channels, bias_grad);
}

template void run_tiled_grad<float>(const TiledPass&, const Conv2dKernels<float>&, std::int64_t, const Images<const float>&,
                                     const Images<const float>&, float*, float*, int);
template void run_tiled_grad<double>(const TiledPass&, const Conv2dKernels<double>&, std::int64_t,
                                      const Images<const double>&, const Images<const double>&, double*, double*, int);

}  // namespace fedpai
