// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/conv2d.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d/scratch.h"
#include "cpu/dispatch.h"

namespace fedpai {

namespace {

// Registers, cache lines and the widest vector all divide it.
constexpr std::int64_t kAlignment = 64;

template <class T>
std::int64_t aligned_elements(std::int64_t count) {
  const auto unit = kAlignment / static_cast<std::int64_t>(sizeof(T));
  return (count + unit - 1) / unit * unit;
}

template <class T>
VectorShape vector_shape(const Conv2dKernels<T>& kernels) {
  return {kernels.lanes, kernels.accumulators, static_cast<std::int64_t>(sizeof(T))};
}

// The grid rectangle of one patch.
struct PatchBox {
  std::int64_t tile_y_begin, tile_y_end;  // register tiles
  std::int64_t tile_x_begin, tile_x_end;
  std::int64_t y, x, height, width;  // pixels
};

PatchBox patch_box(const Pass& pass, std::int64_t patch) {
  const auto across = static_cast<std::int64_t>(pass.x.patch_cuts.size()) - 1;
  const auto py = static_cast<std::size_t>(patch / across);
  const auto px = static_cast<std::size_t>(patch % across);
  PatchBox box{};
  box.tile_y_begin = pass.y.patch_cuts[py];
  box.tile_y_end = pass.y.patch_cuts[py + 1];
  box.tile_x_begin = pass.x.patch_cuts[px];
  box.tile_x_end = pass.x.patch_cuts[px + 1];
  box.y = pass.y.cuts[static_cast<std::size_t>(box.tile_y_begin)];
  box.x = pass.x.cuts[static_cast<std::size_t>(box.tile_x_begin)];
  box.height = pass.y.cuts[static_cast<std::size_t>(box.tile_y_end)] - box.y;
  box.width = pass.x.cuts[static_cast<std::size_t>(box.tile_x_end)] - box.x;
  return box;
}

// Where the packed pixels of a patch come from: one segment per packed row and column residue.
void list_segments(const Pass& pass, const PatchBox& box, std::int64_t source_row, std::int64_t source_column,
                   std::vector<PackSegment>& segments) {
  segments.clear();
  for (const PassAxis::Residue& ry : pass.y.residues) {
    for (std::int64_t i = 0; i < box.height + ry.halo; ++i) {
      const std::int64_t y = (box.y + i) * pass.y.source_step + ry.residue + pass.y.first_shift;
      const bool inside = y >= 0 && y < pass.y.source_extent;
      for (const PassAxis::Residue& rx : pass.x.residues) {
        const std::int64_t step = pass.x.source_step;
        const std::int64_t count = box.width + rx.halo;
        const std::int64_t x = box.x * step + rx.residue + pass.x.first_shift;  // may lie outside
        std::int64_t first = x >= 0 ? 0 : (-x + step - 1) / step;
        std::int64_t last = x >= pass.x.source_extent ? 0 : (pass.x.source_extent - 1 - x) / step + 1;
        first = std::min(first, count);
        last = inside ? std::clamp(last, first, count) : first;
        PackSegment segment{};
        segment.packed = (ry.slot + i) * pass.source_row + rx.slot * pass.lane_group;
        segment.source = last > first ? y * source_row + (x + first * step) * source_column : 0;
        segment.step = step * source_column;
        segment.left = static_cast<std::int32_t>(first);
        segment.count = static_cast<std::int32_t>(last - first);
        segment.right = static_cast<std::int32_t>(count - last);
        segments.push_back(segment);
      }
    }
  }
}

template <class T>
void pack_block(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t block, const Images<const T>& source,
                std::int64_t first_image, int lanes_valid, const std::vector<PackSegment>& segments, T* packed) {
  const std::int64_t begin = pass.block_channel_begin[static_cast<std::size_t>(block)];
  const std::int64_t end = pass.block_channel_begin[static_cast<std::size_t>(block) + 1];
  PackArgs<T> args{};
  args.source = source.data + first_image * source.batch;
  args.source_channel = source.channel;
  args.source_lane = source.batch;
  args.channels = pass.channels.data() + begin;
  args.channel_count = end - begin;
  args.segments = segments.data();
  args.segment_count = static_cast<std::int64_t>(segments.size());
  args.packed = packed;
  args.plane = pass.plane;
  args.blocks = pass.tiling.blocks;
  args.lanes_valid = lanes_valid;
  kernels.pack(args);
}

// How a register tile addresses the dest: the tensor itself, or a staging patch where the tensor's images are not
// adjacent or do not fill the lane group.
template <class T>
struct DestView {
  T* origin;  // grid position (0, 0) of the patch's coordinates below
  std::int64_t channel, row, column;
};

template <class T>
DestView<T> dest_in_place(const Pass& pass, const Images<T>& dest, std::int64_t first_image) {
  return {dest.data + first_image * dest.batch + pass.y.dest_origin * dest.row + pass.x.dest_origin * dest.column,
          dest.channel, dest.row * pass.y.dest_step, dest.column * pass.x.dest_step};
}

template <class T>
DestView<T> dest_staged(const Pass& pass, const PatchBox& box, T* staging) {
  const std::int64_t row = box.width * pass.lane_group;
  return {staging - box.y * row - box.x * pass.lane_group, box.height * row, row, pass.lane_group};
}

void run_offsets(const Pass& pass, int lanes, std::int64_t columns, std::int64_t dest_column, std::int64_t* offsets) {
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t b = 0; b < pass.tiling.blocks; ++b) {
      offsets[c * pass.tiling.blocks + b] = c * dest_column + b * lanes;
    }
  }
}

// Calls visit(rows, run, corner y, corner x) for every register tile of a patch.
template <class F>
void for_each_tile(const Pass& pass, const PatchBox& box, F&& visit) {
  for (std::int64_t ty = box.tile_y_begin; ty < box.tile_y_end; ++ty) {
    const std::int64_t y = pass.y.cuts[static_cast<std::size_t>(ty)];
    const std::int64_t rows = pass.y.cuts[static_cast<std::size_t>(ty) + 1] - y;
    for (std::int64_t tx = box.tile_x_begin; tx < box.tile_x_end; ++tx) {
      const std::int64_t x = pass.x.cuts[static_cast<std::size_t>(tx)];
      const std::int64_t columns = pass.x.cuts[static_cast<std::size_t>(tx) + 1] - x;
      visit(rows, columns, y, x);
    }
  }
}

struct TaskRange {
  std::int64_t begin, end;
};

// The tasks of a channel block whose dest channel lies in [channel_begin, channel_end).
TaskRange tasks_of(const Pass& pass, std::int64_t block, std::int64_t channel_begin, std::int64_t channel_end) {
  const auto first = pass.tasks.begin() + pass.block_task_begin[static_cast<std::size_t>(block)];
  const auto last = pass.tasks.begin() + pass.block_task_begin[static_cast<std::size_t>(block) + 1];
  const auto before = [](const RowTask& task, std::int64_t channel) { return task.channel < channel; };
  return {std::lower_bound(first, last, channel_begin, before) - pass.tasks.begin(),
          std::lower_bound(first, last, channel_end, before) - pass.tasks.begin()};
}

// Cuts the dest channels into `parts` ranges of equal work: entries, and a constant per channel for its stores.
std::vector<std::int64_t> cut_channels(const Pass& pass, std::int64_t parts) {
  constexpr std::int64_t kWorkPerChannel = 2;
  std::vector<std::int64_t> work(static_cast<std::size_t>(pass.dest_channels), kWorkPerChannel);
  for (const RowTask& task : pass.tasks) work[static_cast<std::size_t>(task.channel)] += task.end - task.begin;
  std::int64_t total = 0;
  for (const std::int64_t w : work) total += w;
  std::vector<std::int64_t> cuts{0};
  std::int64_t sum = 0;
  for (std::int64_t c = 0; c < pass.dest_channels; ++c) {
    while (static_cast<std::int64_t>(cuts.size()) < parts &&
           sum * parts >= total * static_cast<std::int64_t>(cuts.size())) {
      cuts.push_back(c);
    }
    sum += work[static_cast<std::size_t>(c)];
  }
  while (static_cast<std::int64_t>(cuts.size()) <= parts) cuts.push_back(pass.dest_channels);
  return cuts;
}

std::int64_t largest_patch_pixels(const Pass& pass) {
  std::int64_t largest = 0;
  for (std::int64_t p = 0; p < pass.patches(); ++p) {
    const PatchBox box = patch_box(pass, p);
    largest = std::max(largest, box.height * box.width);
  }
  return largest;
}

// A unit of work is one patch of one lane group. Lane groups vary fastest: neighbours share cache lines and pages.
struct Units {
  std::int64_t groups, count;

  Units(const Pass& pass, std::int64_t batch)
      : groups((batch + pass.lane_group - 1) / pass.lane_group), count(groups * pass.patches()) {}
  std::int64_t patch(std::int64_t unit) const { return unit / groups; }
  std::int64_t group(std::int64_t unit) const { return unit % groups; }
};

// ------------------------------------------------------------------------------------------- forward direction

// The sums of one unit for the dest channels [channel_begin, channel_end).
template <class T>
void accumulate_unit(const Pass& pass, const Conv2dKernels<T>& kernels, const PatchBox& box,
                     const std::vector<PackSegment>& segments, std::int64_t first_image, int lanes_valid,
                     const Images<const T>& source, const T* values, const T* bias, const Images<T>& dest,
                     std::int64_t channel_begin, std::int64_t channel_end, T* packed, T* staging) {
  const bool in_place = dest.batch == 1 && lanes_valid == pass.lane_group;
  const DestView<T> view = in_place ? dest_in_place(pass, dest, first_image) : dest_staged(pass, box, staging);
  std::int64_t dest_run[kMaxTileRun];
  run_offsets(pass, kernels.lanes, pass.tiling.tile_columns, view.column, dest_run);

  for (std::int64_t block = 0; block < pass.blocks(); ++block) {
    pack_block(pass, kernels, block, source, first_image, lanes_valid, segments, packed);
    const TaskRange range = tasks_of(pass, block, channel_begin, channel_end);
    TileArgs<T> args{};
    args.source_row = pass.source_row;
    args.offset = pass.offset.data();
    args.value = values;
    args.task = pass.tasks.data() + range.begin;
    args.tasks = range.end - range.begin;
    args.dest_channel = view.channel;
    args.dest_row = view.row;
    args.dest_run = dest_run;
    args.bias = bias;
    args.accumulate = block > 0;
    for_each_tile(pass, box, [&](std::int64_t rows, std::int64_t columns, std::int64_t y, std::int64_t x) {
      args.source = packed + (y - box.y) * pass.source_row + (x - box.x) * pass.lane_group;
      args.dest = view.origin + y * view.row + x * view.column;
      kernels.tile[rows - 1][columns * pass.tiling.blocks - 1](args);
    });
  }

  if (in_place) return;
  const DestView<T> target = dest_in_place(pass, dest, first_image);
  UnpackArgs<T> args{};
  args.packed = staging;
  args.plane = view.channel;
  args.packed_row = view.row;
  args.dest = target.origin + box.y * target.row + box.x * target.column;
  args.dest_channel = target.channel;
  args.dest_row = target.row;
  args.dest_column = target.column;
  args.dest_lane = dest.batch;
  args.channel_begin = channel_begin;
  args.channel_end = channel_end;
  args.rows = box.height;
  args.columns = box.width;
  args.blocks = pass.tiling.blocks;
  args.lanes_valid = lanes_valid;
  kernels.unpack(args);
}

// Values in walking order.
template <class T>
const T* ordered_values(const Pass& pass, const T* values, T* buffer, int threads) {
  if (pass.order_is_identity) return values;
  const std::int64_t entries = pass.entries();
  const std::int32_t* const order = pass.order.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (entries > 65536)
  for (std::int64_t j = 0; j < entries; ++j) buffer[j] = values[order[j]];
  return buffer;
}

template <class T>
void run_pass(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& source,
              const T* values, const T* bias, const Images<T>& dest, int threads) {
  const Units units(pass, batch);
  // With fewer units than threads can share evenly, the dest channels are split as well; each part packs for itself.
  std::int64_t parts = 1;
  if (threads > 1 && units.count < 4 * threads && units.count % threads != 0) {
    parts = std::min<std::int64_t>(threads, pass.dest_channels);
  }
  const std::vector<std::int64_t> cuts = cut_channels(pass, parts);

  const std::int64_t packed_size = aligned_elements<T>(pass.plane * pass.tiling.channel_block);
  const bool stages = dest.batch != 1 || batch % pass.lane_group != 0;
  const std::int64_t staging_size =
      stages ? aligned_elements<T>(pass.dest_channels * largest_patch_pixels(pass) * pass.lane_group) : 0;
  const std::int64_t values_size = aligned_elements<T>(pass.entries());
  static thread_local Scratch scratch;
  T* const memory = static_cast<T*>(scratch.reserve(
      sizeof(T) * static_cast<std::size_t>(values_size + threads * (packed_size + staging_size))));
  const T* const ordered = ordered_values(pass, values, memory, threads);

  // Groups that share a cache line go to one thread.
  const auto line = std::max<std::int64_t>(1, kAlignment / (pass.lane_group * static_cast<std::int64_t>(sizeof(T))));
  const int chunk = static_cast<int>(parts > 1 ? 1 : line);
#pragma omp parallel num_threads(threads)
  {
    T* const packed = memory + values_size + omp_get_thread_num() * (packed_size + staging_size);
    T* const staging = packed + packed_size;
    std::vector<PackSegment> segments;
    std::int64_t segments_of = -1;
    PatchBox box{};
#pragma omp for schedule(dynamic, chunk)
    for (std::int64_t i = 0; i < units.count * parts; ++i) {
      const std::int64_t unit = i / parts;
      const auto part = static_cast<std::size_t>(i % parts);
      if (units.patch(unit) != segments_of) {
        segments_of = units.patch(unit);
        box = patch_box(pass, segments_of);
        list_segments(pass, box, source.row, source.column, segments);
      }
      const std::int64_t first_image = units.group(unit) * pass.lane_group;
      const int lanes_valid = static_cast<int>(std::min(pass.lane_group, batch - first_image));
      accumulate_unit(pass, kernels, box, segments, first_image, lanes_valid, source, ordered, bias, dest, cuts[part],
                      cuts[part + 1], packed, staging);
    }
  }
}

// --------------------------------------------------------------------------------------------- weight gradient

// Adds one unit's products to the sums of channel block `block`.
template <class T>
void grad_unit(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t block, const TaskRange& range,
               const PatchBox& box, const std::vector<PackSegment>& segments, std::int64_t first_image, int lanes_valid,
               const Images<const T>& x, const Images<const T>& dy, bool accumulate, T* sums, T* bias_sums, T* packed,
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
  args.accumulate = accumulate;
  args.bias_sums = block == 0 ? bias_sums : nullptr;
  for_each_tile(pass, box, [&](std::int64_t rows, std::int64_t columns, std::int64_t y, std::int64_t x_pixel) {
    args.source = packed + (y - box.y) * pass.source_row + (x_pixel - box.x) * pass.lane_group;
    args.dest = view.origin + y * view.row + x_pixel * view.column;
    kernels.grad_tile[rows - 1][columns * pass.tiling.blocks - 1](args);
    args.accumulate = true;
  });
}

template <class T>
void run_weight_grad(const Pass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& x,
                     const Images<const T>& dy, T* values_grad, T* bias_grad, int threads) {
  const Units units(pass, batch);
  const std::int64_t lanes = kernels.lanes;
  const std::int64_t entries = pass.entries();

  // Threads share the units, each with sums of its own, or the dest channels, with one set of sums but every thread
  // packing every patch. The first costs an extra pass over the sums per thread, so it is for few non-zeros.
  constexpr std::int64_t kPrivateSumsBytes = 1 << 20;
  const std::int64_t sums_bytes = entries * lanes * static_cast<std::int64_t>(sizeof(T));
  const bool share_units = units.count >= threads && (sums_bytes <= kPrivateSumsBytes || pass.dest_channels < threads);
  const std::int64_t parts =
      share_units ? std::min<std::int64_t>(threads, units.count) : std::min<std::int64_t>(threads, pass.dest_channels);
  const std::vector<std::int64_t> cuts = cut_channels(pass, share_units ? 1 : parts);

  const std::int64_t sums_size = aligned_elements<T>(entries * lanes);
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
  std::fill(bias_sums, buffers, T(0));

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
        grad_unit(pass, kernels, block, range, box, segments, first_image, lanes_valid, x, dy, unit > first_unit,
                  sums + set * sums_size, bias_grad != nullptr ? bias_sums + set * bias_size : nullptr, packed,
                  staging);
      }
    }
  }

  const std::int32_t* const order = pass.order_is_identity ? nullptr : pass.order.data();
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t me = omp_get_thread_num();
    kernels.reduce(sums, sum_sets, sums_size, order, entries * me / team, entries * (me + 1) / team, values_grad);
  }
  if (bias_grad != nullptr) kernels.reduce(bias_sums, sum_sets, bias_size, nullptr, 0, pass.dest_channels, bias_grad);
}

}  // namespace

template <class T>
void conv2d_forward(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, const T* values,
                    const T* bias, Images<T> y, int threads) {
  if (geometry.batch == 0) return;
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kForward, geometry, vector_shape(kernels));
  run_pass(passes->front(), kernels, geometry.batch, x, values, bias, y, threads);
}

template <class T>
void conv2d_input_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> dy, const T* values,
                       Images<T> dx, int threads) {
  if (geometry.batch == 0) return;
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kInputGrad, geometry, vector_shape(kernels));
  for (const Pass& pass : *passes) {
    run_pass<T>(pass, kernels, geometry.batch, dy, values, nullptr, dx, threads);
  }
}

template <class T>
void conv2d_weight_grad(const CompiledPlan& plan, const Conv2dGeometry& geometry, Images<const T> x, Images<const T> dy,
                        T* values_grad, T* bias_grad, int threads) {
  if (geometry.batch == 0) {
    std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
    if (bias_grad != nullptr) std::fill(bias_grad, bias_grad + plan.plan.shape().out_channels, T(0));
    return;
  }
  const Conv2dKernels<T>& kernels = conv2d_kernels<T>();
  const auto passes = plan.schedules.get(plan.plan, Direction::kWeightGrad, geometry, vector_shape(kernels));
  // A tap that only ever reads padding is not in the pass: its gradient is zero.
  if (passes->front().entries() < plan.plan.nnz()) std::fill(values_grad, values_grad + plan.plan.nnz(), T(0));
  run_weight_grad(passes->front(), kernels, geometry.batch, x, dy, values_grad, bias_grad, threads);
}

#define FEDPAI_INSTANTIATE(T)                                                                                        \
  template void conv2d_forward<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const T*, const T*,   \
                                  Images<T>, int);                                                                   \
  template void conv2d_input_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, const T*,          \
                                     Images<T>, int);                                                                \
  template void conv2d_weight_grad<T>(const CompiledPlan&, const Conv2dGeometry&, Images<const T>, Images<const T>, T*, T*, \
                                      int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)

}  // namespace fedpai
