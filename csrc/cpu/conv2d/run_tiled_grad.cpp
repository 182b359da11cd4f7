// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/run.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/conv2d/scratch.h"

namespace fedpai {

namespace {

// Packs the output gradient of those lane groups of a unit that a register tile cannot load from where they lie.
template <class T>
void stage_gradient(const TiledPass& pass, const Conv2dKernels<T>& kernels, const Unit& unit, const Images<const T>& dy,
                    T* staging) {
  const std::int64_t staged = first_staged(pass, dy, unit);
  if (staged == unit.groups(pass)) return;
  const PatchBox& box = unit.box;
  std::vector<PackSegment> rows;
  const DestView<T> view = dest_staged(pass, box, staging, 0);
  for (std::int64_t y = 0; y < box.height; ++y) {
    const std::int64_t from = (pass.y.dest_origin + (box.y + y) * pass.y.dest_step) * dy.row +
                              (pass.x.dest_origin + box.x * pass.x.dest_step) * dy.column;
    rows.push_back({y * view.row, from, dy.column * pass.x.dest_step, 0, static_cast<std::int32_t>(box.width), 0});
  }
  PackArgs<T> args = pack_args(pass, unit, dy, rows);
  args.source += staged * pass.lane_group * dy.batch;
  args.groups -= static_cast<int>(staged);
  args.images -= staged * pass.lane_group;
  args.channel_count = pass.dest_channels;
  args.packed = staging;
  args.plane = view.channel;
  args.packed_group = staged_group(pass, box);
  kernels.pack(args);
}

// Adds one unit's products to the sums of the rows [row_begin, row_end).
template <class T>
void grad_unit(const TiledPass& pass, const Conv2dKernels<T>& kernels, const Unit& unit, const Images<const T>& x,
               const NormMap<T>* norm, const Images<const T>& dy, std::int64_t row_begin, std::int64_t row_end, T* sums, T* bias_sums,
               T* packed, T* staging) {
  stage_gradient(pass, kernels, unit, dy, staging);

  GradTileArgs<T> args{};
  args.sums = sums;
  for (std::int64_t block = 0; block < pass.blocks(); ++block) {
    const TaskRange range = tasks_of(pass, block, row_begin, row_end);
    if (range.empty()) continue;
    pack_block(pass, kernels, block, unit, x, norm, packed);
    args.bias_sums = block == 0 ? bias_sums : nullptr;
    walk_tiles<T, const T>(pass, kernels.lanes, unit, packed, dy, staging, range, args,
                           [&](int height, const TileStrip& strip, GradTileArgs<T>& tile) {
                             if (pass.tiling.height == 1) {
                               kernels.grad_tile[strip.rows - 1][strip.run - 1](tile);
                               return;
                             }
                             tile.tile_rows = strip.rows;
                             tile.tile_run = strip.run;
                             kernels.grad_panel[height - 1](tile);
                           });
  }
}

}  // namespace

template <class T>
void run_tiled_grad(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& x,
                     const NormMap<T>* norm, const Images<const T>& dy, T* values_grad, T* bias_grad, int threads) {
  const Units units(pass, batch, threads);
  const std::int64_t lanes = kernels.lanes;
  const std::int64_t count = pass.values();

  // Threads share the units, each with sums of its own, or the rows, with one set of sums but every thread
  // packing every patch.
  const std::int64_t sums_bytes = count * static_cast<std::int64_t>(sizeof(T));
  const bool share_units = !gradient_splits_rows(units.count, threads, sums_bytes, pass.dest_channels);
  const std::int64_t parts =
      share_units ? std::min<std::int64_t>(threads, units.count) : std::min<std::int64_t>(threads, pass.dest_channels);
  const std::vector<std::int64_t> cuts = cut_rows(pass, share_units ? 1 : parts);

  const std::int64_t sums_size = aligned_elements<T>(count);
  const std::int64_t bias_size = bias_grad != nullptr ? aligned_elements<T>(pass.dest_channels * lanes) : 0;
  const std::int64_t sum_sets = share_units ? parts : 1;
  const UnitMemory<T> unit_memory(pass, units, dy, batch);
  static thread_local Scratch scratch;
  T* const sums = static_cast<T*>(scratch.reserve(
      sizeof(T) * static_cast<std::size_t>(sum_sets * (sums_size + bias_size) + parts * unit_memory.size())));
  T* const bias_sums = sums + sum_sets * sums_size;
  T* const buffers = bias_sums + sum_sets * bias_size;
  std::fill(sums, buffers, T(0));

#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (std::int64_t part = 0; part < parts; ++part) {
    T* const packed = buffers + part * unit_memory.size();
    T* const staging = packed + unit_memory.packed;
    const std::int64_t set = share_units ? part : 0;
    const std::int64_t first_unit = share_units ? units.count * part / parts : 0;
    const std::int64_t last_unit = share_units ? units.count * (part + 1) / parts : units.count;
    const auto cut = static_cast<std::size_t>(share_units ? 0 : part);
    Unit unit;
    for (std::int64_t index = first_unit; index < last_unit; ++index) {
      move_to(unit, index, units, pass, batch, x);
      grad_unit(pass, kernels, unit, x, norm, dy, cuts[cut], cuts[cut + 1], sums + set * sums_size,
                bias_grad != nullptr ? bias_sums + set * bias_size : nullptr, packed, staging);
    }
  }

#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
  for (std::int64_t j = 0; j < count; ++j) {
    const std::int32_t value = pass.order[static_cast<std::size_t>(j)];
    if (value == kNoValue) continue;
    T total = sums[j];
    for (std::int64_t set = 1; set < sum_sets; ++set) total += sums[set * sums_size + j];
    values_grad[value] = total;
  }
  if (bias_grad != nullptr) kernels.reduce(bias_sums, sum_sets, bias_size, nullptr, 0, pass.dest_channels, bias_grad);
}

template void run_tiled_grad<float>(const TiledPass&, const Conv2dKernels<float>&, std::int64_t, const Images<const float>&,
                                     const NormMap<float>*, const Images<const float>&, float*, float*, int);
template void run_tiled_grad<double>(const TiledPass&, const Conv2dKernels<double>&, std::int64_t,
                                      const Images<const double>&, const NormMap<double>*,
                                      const Images<const double>&, double*, double*, int);

}  // namespace fedpai
