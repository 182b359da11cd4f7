// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/schedule.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace fedpai {

namespace {

constexpr std::int64_t kUnused = std::numeric_limits<std::int64_t>::min();

// Which kernel positions of one axis occur among the entries that a pass keeps, and how far each one shifts the source.
struct AxisTaps {
  std::vector<std::int64_t> shift;  // kUnused where the pass has no such tap

  bool any() const {
    return std::any_of(shift.begin(), shift.end(), [](std::int64_t s) { return s != kUnused; });
  }
};

// The packed positions depend on the patch, so this runs after the tiling is chosen; before that, residues and halos
// are known and slots is zero.
void find_residues(PassAxis& axis, const AxisTaps& taps) {
  axis.tap_slot.assign(taps.shift.size(), -1);
  if (!taps.any()) return;
  axis.first_shift = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t shift : taps.shift) {
    if (shift != kUnused) axis.first_shift = std::min(axis.first_shift, shift);
  }
  for (const std::int64_t shift : taps.shift) {
    if (shift == kUnused) continue;
    const std::int64_t residue = (shift - axis.first_shift) % axis.source_step;
    const std::int64_t reach = (shift - axis.first_shift) / axis.source_step;
    auto found = std::find_if(axis.residues.begin(), axis.residues.end(),
                              [&](const PassAxis::Residue& r) { return r.residue == residue; });
    if (found == axis.residues.end()) axis.residues.push_back({residue, reach, 0});
    else found->halo = std::max(found->halo, reach);
  }
}

void place_slots(PassAxis& axis, const AxisTaps& taps, std::int64_t tile, std::int64_t tiles_per_patch) {
  axis.cuts = balanced_cuts(axis.grid, tile);
  const std::int64_t tiles = static_cast<std::int64_t>(axis.cuts.size()) - 1;
  axis.patch_cuts = balanced_cuts(tiles, tiles_per_patch);
  std::int64_t extent = 0;
  for (std::size_t i = 0; i + 1 < axis.patch_cuts.size(); ++i) {
    extent = std::max(extent, axis.cuts[static_cast<std::size_t>(axis.patch_cuts[i + 1])] -
                                  axis.cuts[static_cast<std::size_t>(axis.patch_cuts[i])]);
  }
  axis.slots = 0;
  for (PassAxis::Residue& residue : axis.residues) {
    residue.slot = axis.slots;
    axis.slots += extent + residue.halo;
  }
  for (std::size_t k = 0; k < taps.shift.size(); ++k) {
    if (taps.shift[k] == kUnused) continue;
    const std::int64_t distance = taps.shift[k] - axis.first_shift;
    for (const PassAxis::Residue& residue : axis.residues) {
      if (residue.residue == distance % axis.source_step) axis.tap_slot[k] = residue.slot + distance / axis.source_step;
    }
  }
}

std::int64_t largest_halo(const PassAxis& axis) {
  std::int64_t halo = 0;
  for (const PassAxis::Residue& residue : axis.residues) halo = std::max(halo, residue.halo);
  return halo;
}

// The entries of `list` whose taps the pass has, cut into channel blocks. Offsets are relative to the block's patch.
void lay_out_entries(Pass& pass, const EntryList& list, const std::vector<char>& channel_used) {
  std::vector<std::int32_t> position(channel_used.size(), -1);
  for (std::size_t c = 0; c < channel_used.size(); ++c) {
    if (channel_used[c] == 0) continue;
    position[c] = static_cast<std::int32_t>(pass.channels.size());
    pass.channels.push_back(static_cast<std::int32_t>(c));
  }
  const auto channel_count = static_cast<std::int64_t>(pass.channels.size());
  const std::int64_t channel_block = pass.tiling.channel_block;
  const std::int64_t blocks = std::max<std::int64_t>(1, (channel_count + channel_block - 1) / channel_block);
  for (std::int64_t b = 0; b < blocks; ++b) pass.block_channel_begin.push_back(b * channel_block);
  pass.block_channel_begin.push_back(channel_count);

  // Where each tap lies in a channel's patch; negative where the pass has no such tap.
  std::vector<std::int64_t> tap_offset;
  for (const std::int64_t slot_y : pass.y.tap_slot) {
    for (const std::int64_t slot_x : pass.x.tap_slot) {
      tap_offset.push_back(slot_y < 0 || slot_x < 0 ? -1 : slot_y * pass.source_row + slot_x * pass.lane_group);
    }
  }
  std::vector<std::int32_t> cursor(list.row_begin.begin(), list.row_begin.end() - 1);
  pass.offset.reserve(static_cast<std::size_t>(list.size()));
  pass.order.reserve(static_cast<std::size_t>(list.size()));
  for (std::int64_t b = 0; b < blocks; ++b) {
    pass.block_task_begin.push_back(static_cast<std::int64_t>(pass.tasks.size()));
    const std::int64_t first = pass.block_channel_begin[static_cast<std::size_t>(b)];
    const std::int64_t last = pass.block_channel_begin[static_cast<std::size_t>(b) + 1];
    for (std::int64_t row = 0; row < list.rows(); ++row) {
      const auto begin = static_cast<std::int32_t>(pass.offset.size());
      auto j = static_cast<std::size_t>(cursor[static_cast<std::size_t>(row)]);
      const auto end = static_cast<std::size_t>(list.row_begin[static_cast<std::size_t>(row) + 1]);
      for (; j < end; ++j) {
        const std::int64_t within = tap_offset[static_cast<std::size_t>(list.tap[j])];
        if (within < 0) continue;
        const std::int64_t local = position[static_cast<std::size_t>(list.column[j])];
        if (local >= last) break;
        pass.offset.push_back(static_cast<std::int32_t>((local - first) * pass.plane + within));
        pass.order.push_back(list.value[j]);
      }
      cursor[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(j);
      const auto stop = static_cast<std::int32_t>(pass.offset.size());
      // The first block visits every dest channel, so that a channel without entries still gets its bias or zero.
      if (b == 0 || stop > begin) pass.tasks.push_back({static_cast<std::int32_t>(row), begin, stop});
    }
  }
  pass.block_task_begin.push_back(static_cast<std::int64_t>(pass.tasks.size()));
  pass.order_is_identity = true;
  for (std::size_t j = 0; j < pass.order.size() && pass.order_is_identity; ++j) {
    pass.order_is_identity = pass.order[j] == static_cast<std::int32_t>(j);
  }
}

Pass build_pass(const EntryList& list, PassAxis y, PassAxis x, AxisTaps taps_y, AxisTaps taps_x, std::int64_t batch,
                const VectorShape& vector, bool weight_grad, const Tiling* tiling) {
  // Only taps and channels that occur are packed.
  const std::size_t kernel_w = taps_x.shift.size();
  std::vector<char> used_y(taps_y.shift.size(), 0), used_x(kernel_w, 0);
  std::vector<char> channel_used(static_cast<std::size_t>(list.columns), 0);
  std::int64_t entries = 0;
  std::vector<char> tap_kept, tap_used(used_y.size() * kernel_w, 0);
  for (const std::int64_t shift_y : taps_y.shift) {
    for (const std::int64_t shift_x : taps_x.shift) tap_kept.push_back(shift_y != kUnused && shift_x != kUnused);
  }
  for (std::size_t j = 0; j < list.column.size(); ++j) {
    const auto tap = static_cast<std::size_t>(list.tap[j]);
    if (!tap_kept[tap]) continue;
    tap_used[tap] = 1;
    channel_used[static_cast<std::size_t>(list.column[j])] = 1;
    ++entries;
  }
  for (std::size_t tap = 0; tap < tap_used.size(); ++tap) {
    if (tap_used[tap]) used_y[tap / kernel_w] = used_x[tap % kernel_w] = 1;
  }
  for (std::size_t k = 0; k < used_y.size(); ++k) {
    if (used_y[k] == 0) taps_y.shift[k] = kUnused;
  }
  for (std::size_t k = 0; k < used_x.size(); ++k) {
    if (used_x[k] == 0) taps_x.shift[k] = kUnused;
  }

  Pass pass;
  find_residues(y, taps_y);
  find_residues(x, taps_x);
  const TilingProblem problem{y.grid,
                              x.grid,
                              largest_halo(y),
                              largest_halo(x),
                              std::max<std::int64_t>(1, static_cast<std::int64_t>(y.residues.size())),
                              std::max<std::int64_t>(1, static_cast<std::int64_t>(x.residues.size())),
                              batch,
                              list.rows(),
                              std::count(channel_used.begin(), channel_used.end(), 1),
                              entries,
                              vector.element_size,
                              vector.lanes,
                              vector.accumulators,
                              weight_grad};
  pass.tiling = tiling != nullptr ? *tiling : choose_tiling(problem);
  place_slots(y, taps_y, pass.tiling.tile_rows, pass.tiling.patch_rows);
  place_slots(x, taps_x, pass.tiling.tile_columns, pass.tiling.patch_columns);
  pass.y = std::move(y);
  pass.x = std::move(x);
  pass.dest_channels = list.rows();
  pass.lane_group = static_cast<std::int64_t>(pass.tiling.blocks) * vector.lanes;
  pass.source_row = pass.x.slots * pass.lane_group;
  pass.plane = pass.y.slots * pass.source_row;
  // In double: the product may exceed 64 bits.
  if (static_cast<double>(pass.y.slots) * static_cast<double>(pass.source_row) *
          static_cast<double>(pass.tiling.channel_block) >
      std::numeric_limits<std::int32_t>::max()) {
    throw std::length_error("input: one patch of the image exceeds 2^31 - 1 elements");
  }
  lay_out_entries(pass, list, channel_used);
  return pass;
}

PassAxis forward_axis(std::int64_t out, std::int64_t in, std::int64_t stride) {
  PassAxis axis;
  axis.grid = out;
  axis.source_step = stride;
  axis.source_extent = in;
  return axis;
}

// Whether a tap reads the image from any position of the grid. One that only ever reads padding adds nothing, and would
// make the packed patch as wide as the padding.
bool meets_image(const PassAxis& axis, std::int64_t shift) {
  const std::int64_t first = shift >= 0 ? 0 : (-shift + axis.source_step - 1) / axis.source_step;
  return first < axis.grid && first * axis.source_step + shift < axis.source_extent;
}

AxisTaps forward_taps(const PassAxis& axis, std::int64_t kernel, std::int64_t dilation, std::int64_t pad) {
  AxisTaps taps;
  for (std::int64_t k = 0; k < kernel; ++k) {
    const std::int64_t shift = k * dilation - pad;
    taps.shift.push_back(meets_image(axis, shift) ? shift : kUnused);
  }
  return taps;
}

Pass forward_like(const Plan& plan, const Conv2dGeometry& g, const VectorShape& vector, bool weight_grad,
                  const Tiling* tiling) {
  const WeightShape& shape = plan.shape();
  const PassAxis y = forward_axis(g.out_h, g.in_h, g.stride_h);
  const PassAxis x = forward_axis(g.out_w, g.in_w, g.stride_w);
  return build_pass(plan.by_output(), y, x, forward_taps(y, shape.kernel_h, g.dilation_h, g.pad_top),
                    forward_taps(x, shape.kernel_w, g.dilation_w, g.pad_left), g.batch, vector, weight_grad, tiling);
}

// Input pixels i = q * stride + residue; out pixel o reaches i through tap k when o * stride + k * dilation - pad == i,
// that is o = q + (residue + pad - k * dilation) / stride, where the division leaves no rest.
PassAxis input_grad_axis(std::int64_t in, std::int64_t out, std::int64_t stride, std::int64_t residue) {
  PassAxis axis;
  axis.grid = (in - residue + stride - 1) / stride;
  axis.dest_step = stride;
  axis.dest_origin = residue;
  axis.source_extent = out;
  return axis;
}

AxisTaps input_grad_taps(const PassAxis& axis, std::int64_t kernel, std::int64_t dilation, std::int64_t pad) {
  AxisTaps taps;
  for (std::int64_t k = 0; k < kernel; ++k) {
    const std::int64_t distance = axis.dest_origin + pad - k * dilation;
    const bool reaches = distance % axis.dest_step == 0 && meets_image(axis, distance / axis.dest_step);
    taps.shift.push_back(reaches ? distance / axis.dest_step : kUnused);
  }
  return taps;
}

}  // namespace

Pass forward_pass(const Plan& plan, const Conv2dGeometry& geometry, const VectorShape& vector,
                  const Tiling* tiling) {
  return forward_like(plan, geometry, vector, false, tiling);
}

Pass weight_grad_pass(const Plan& plan, const Conv2dGeometry& geometry, const VectorShape& vector,
                  const Tiling* tiling) {
  return forward_like(plan, geometry, vector, true, tiling);
}

std::vector<Pass> input_grad_passes(const Plan& plan, const Conv2dGeometry& g, const VectorShape& vector) {
  const WeightShape& shape = plan.shape();
  std::vector<Pass> passes;
  for (std::int64_t ry = 0; ry < std::min(g.stride_h, g.in_h); ++ry) {
    for (std::int64_t rx = 0; rx < std::min(g.stride_w, g.in_w); ++rx) {
      const PassAxis y = input_grad_axis(g.in_h, g.out_h, g.stride_h, ry);
      const PassAxis x = input_grad_axis(g.in_w, g.out_w, g.stride_w, rx);
      passes.push_back(build_pass(plan.by_input(), y, x, input_grad_taps(y, shape.kernel_h, g.dilation_h, g.pad_top),
                                  input_grad_taps(x, shape.kernel_w, g.dilation_w, g.pad_left), g.batch, vector, false,
                                  nullptr));
    }
  }
  return passes;
}

}  // namespace fedpai
