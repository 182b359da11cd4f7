// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/patch.h"

#include <algorithm>

#include "cpu/conv2d/partition.h"

namespace fedpai {

PatchBox patch_box(const TiledPass& pass, std::int64_t patch) {
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

std::int64_t largest_patch_pixels(const TiledPass& pass) {
  std::int64_t largest = 0;
  for (std::int64_t p = 0; p < pass.patches(); ++p) {
    const PatchBox box = patch_box(pass, p);
    largest = std::max(largest, box.height * box.width);
  }
  return largest;
}

void list_segments(const TiledPass& pass, const PatchBox& box, std::int64_t source_row, std::int64_t source_column,
                   std::vector<PackSegment>& segments) {
  segments.clear();
  for (const TiledAxis::Residue& ry : pass.y.residues) {
    for (std::int64_t i = 0; i < box.height + ry.halo; ++i) {
      const std::int64_t y = (box.y + i) * pass.y.source_step + ry.residue + pass.y.first_shift;
      const bool inside = y >= 0 && y < pass.y.source_extent;
      for (const TiledAxis::Residue& rx : pass.x.residues) {
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

void run_offsets(const TiledPass& pass, int lanes, std::int64_t columns, std::int64_t dest_column,
                 std::vector<std::int64_t>& offsets) {
  offsets.resize(static_cast<std::size_t>(columns * pass.tiling.blocks));
  std::size_t i = 0;
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t b = 0; b < pass.tiling.blocks; ++b) offsets[i++] = c * dest_column + b * lanes;
  }
}

TaskRange tasks_of(const TiledPass& pass, std::int64_t block, std::int64_t row_begin, std::int64_t row_end) {
  const auto first = pass.tasks.begin() + pass.block_task_begin[static_cast<std::size_t>(block)];
  const auto last = pass.tasks.begin() + pass.block_task_begin[static_cast<std::size_t>(block) + 1];
  const auto before = [](const RowTask& task, std::int64_t row) { return task.row < row; };
  return {std::lower_bound(first, last, row_begin, before) - pass.tasks.begin(),
          std::lower_bound(first, last, row_end, before) - pass.tasks.begin()};
}

std::array<TaskRange, kMaxPanelHeight> split_by_height(const TiledPass& pass, const TaskRange& tasks) {
  std::array<TaskRange, kMaxPanelHeight> ranges{};
  const auto before = [](const RowTask& task, std::int64_t row) { return task.row < row; };
  std::int64_t begin = tasks.begin;
  for (std::size_t height = kMaxPanelHeight; height-- > 0;) {
    const std::int64_t next_row =
        height == 0 ? static_cast<std::int64_t>(pass.rows.size()) : pass.height_begin[height - 1];
    const std::int64_t end = std::lower_bound(pass.tasks.begin() + begin, pass.tasks.begin() + tasks.end, next_row, before) -
                             pass.tasks.begin();
    ranges[height] = {begin, end};
    begin = end;
  }
  return ranges;
}

std::vector<std::int64_t> cut_rows(const TiledPass& pass, std::int64_t parts) {
  constexpr std::int64_t kWorkPerRow = 2;
  const auto panels = static_cast<std::int64_t>(pass.panel_row_begin.size()) - 1;
  std::vector<std::int64_t> work(static_cast<std::size_t>(panels), 0);
  std::vector<std::int64_t> panel_of(pass.rows.size());
  for (std::size_t p = 0; p < work.size(); ++p) {
    for (std::int64_t row = pass.panel_row_begin[p]; row < pass.panel_row_begin[p + 1]; ++row) {
      panel_of[static_cast<std::size_t>(row)] = static_cast<std::int64_t>(p);
      work[p] += kWorkPerRow;
    }
  }
  for (const RowTask& task : pass.tasks) {
    const auto p = static_cast<std::size_t>(panel_of[static_cast<std::size_t>(task.row)]);
    work[p] += (task.end - task.begin) * (pass.panel_row_begin[p + 1] - pass.panel_row_begin[p]);
  }
  std::vector<std::int64_t> cuts = cut_by_work(work, parts);
  for (std::int64_t& cut : cuts) cut = pass.panel_row_begin[static_cast<std::size_t>(cut)];
  return cuts;
}

}  // namespace fedpai
