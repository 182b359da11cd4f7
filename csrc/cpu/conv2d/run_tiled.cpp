// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/run.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d/patch.h"
#include "cpu/conv2d/scratch.h"

namespace fedpai {

namespace {

// Copies the staging patch of a lane group, the `nth` staged, to where the tensor has it.
template <class T>
void unpack_group(const TiledPass& pass, const Conv2dKernels<T>& kernels, const Unit& unit, std::int64_t group,
                  std::int64_t nth, const Images<T>& dest, std::int64_t row_begin, std::int64_t row_end, T* staging) {
  const PatchBox& box = unit.box;
  const DestView<T> view = dest_staged(pass, box, staging, nth);
  const DestView<T> target = dest_in_place(pass, dest, unit, group);
  UnpackArgs<T> args{};
  args.packed = staging + nth * staged_group(pass, box);
  args.plane = view.channel;
  args.packed_row = view.row;
  args.dest = target.origin + box.y * target.row + box.x * target.column;
  args.dest_channel = target.channel;
  args.dest_row = target.row;
  args.dest_column = target.column;
  args.dest_lane = dest.batch;
  args.channels = pass.rows.data() + row_begin;
  args.channel_count = row_end - row_begin;
  args.rows = box.height;
  args.columns = box.width;
  args.blocks = pass.tiling.blocks;
  args.lanes_valid = unit.lanes_valid(pass, group);
  kernels.unpack(args);
}

// The sums of one unit for the rows [row_begin, row_end).
template <class T>
void accumulate_unit(const TiledPass& pass, const Conv2dKernels<T>& kernels, const Unit& unit,
                     const Images<const T>& source, const NormMap<T>* norm, const T* values, const T* bias,
                     const Images<T>& dest, std::int64_t row_begin, std::int64_t row_end, T* packed, T* staging) {
  TileArgs<T> args{};
  args.value = values;
  args.bias = bias;

  for (std::int64_t block = 0; block < pass.blocks(); ++block) {
    const TaskRange range = tasks_of(pass, block, row_begin, row_end);
    if (range.empty()) continue;
    pack_block(pass, kernels, block, unit, source, norm, packed);
    args.accumulate = block > 0;
    walk_tiles(pass, kernels.lanes, unit, packed, dest, staging, range, args,
               [&](int height, const TileStrip& strip, TileArgs<T>& tile) {
                 tile.tiles = strip.tiles;
                 kernels.tile[height - 1][strip.rows - 1][strip.run - 1](tile);
               });
  }

  const std::int64_t staged = first_staged(pass, dest, unit);
  for (std::int64_t group = staged; group < unit.groups(pass); ++group) {
    unpack_group(pass, kernels, unit, group, group - staged, dest, row_begin, row_end, staging);
  }
}

}  // namespace

template <class T>
void run_tiled(const TiledPass& pass, const Conv2dKernels<T>& kernels, std::int64_t batch, const Images<const T>& source,
              const NormMap<T>* norm, const T* values, const T* bias, const Images<T>& dest, int threads) {
  const Units units(pass, batch, threads);
  // Where the dest channels are split as well, each part packs for itself.
  const std::int64_t parts =
      sums_split_rows(units.count, threads) ? std::min<std::int64_t>(threads, pass.dest_channels) : 1;
  const std::vector<std::int64_t> cuts = cut_rows(pass, parts);

  const UnitMemory<T> unit_memory(pass, units, dest, batch);
  const std::int64_t values_size = aligned_elements<T>(pass.values());
  static thread_local Scratch scratch;
  T* const memory = static_cast<T*>(
      scratch.reserve(sizeof(T) * static_cast<std::size_t>(values_size + threads * unit_memory.size())));
  const T* const ordered = ordered_values(pass.order, pass.order_is_identity, values, memory, threads);

  // Units that share a cache line go to one thread.
  const auto line = std::max<std::int64_t>(1, kScratchAlignment / (units.images * static_cast<std::int64_t>(sizeof(T))));
  const int chunk = static_cast<int>(parts > 1 ? 1 : line);
#pragma omp parallel num_threads(threads)
  {
    T* const packed = memory + values_size + omp_get_thread_num() * unit_memory.size();
    T* const staging = packed + unit_memory.packed;
    Unit unit;
#pragma omp for schedule(dynamic, chunk)
    for (std::int64_t i = 0; i < units.count * parts; ++i) {
      const auto part = static_cast<std::size_t>(i % parts);
      move_to(unit, i / parts, units, pass, batch, source);
      accumulate_unit(pass, kernels, unit, source, norm, ordered, bias, dest, cuts[part], cuts[part + 1], packed, staging);
    }
  }
}

template void run_tiled<float>(const TiledPass&, const Conv2dKernels<float>&, std::int64_t, const Images<const float>&,
                              const NormMap<float>*, const float*, const float*, const Images<float>&, int);
template void run_tiled<double>(const TiledPass&, const Conv2dKernels<double>&, std::int64_t, const Images<const double>&,
                               const NormMap<double>*, const double*, const double*, const Images<double>&, int);

}  // namespace fedpai
