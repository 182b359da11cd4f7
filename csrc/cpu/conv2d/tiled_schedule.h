// SPDX-License-Identifier: Apache-2.0
// A pass laid out for the tiled walk: everything that its loops would otherwise compute again each time.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/conv2d/axis.h"
#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/tiling.h"
#include "plan/plan.h"

namespace fedpai {

// One spatial axis of a pass, and where its taps land in a packed patch. A source step s > 1 is removed by packing the
// residues of the source coordinate one after the other: tap shift d has residue d % s and moves by d / s inside it.
struct TiledAxis : Axis {
  std::int64_t first_shift = 0;  // smallest shift in use

  struct Residue {
    std::int64_t residue;
    std::int64_t halo;  // positions needed beyond a patch's own
    std::int64_t slot;  // first packed position
  };
  std::vector<Residue> residues;
  std::int64_t slots = 0;               // packed positions of a full patch
  std::vector<std::int64_t> tap_slot;   // per kernel position along this axis; -1 where no entry uses it

  std::vector<std::int64_t> cuts;        // rows of register tiles, or widths of patches: starts and the end
  std::vector<std::int64_t> patch_cuts;  // patches: indices into cuts
};

struct TiledPass {
  TiledAxis y, x;
  Tiling tiling;
  std::int64_t dest_channels = 0;
  std::int64_t lane_group = 0;  // images per lane group, and elements per packed pixel
  std::int64_t source_row = 0;  // elements between packed rows
  std::int64_t plane = 0;       // elements between packed channels
  std::int64_t group = 0;       // elements between packed lane groups

  // Dest channels, panel by panel, the tallest first.
  std::vector<std::int32_t> rows;
  std::vector<std::int64_t> panel_row_begin;                // per panel, into rows; one more at the end
  std::array<std::int64_t, kMaxPanelHeight> height_begin{};  // [height - 1]: the first row of panels no taller

  // Entries in walking order: by channel block, panel, source channel.
  IndexVector offset;  // per entry: element offset in the packed block; kOffsetsAhead zeros at the end
  IndexVector order;   // per value: index into the packed values, or kNoValue
  bool order_is_identity = false;
  std::int64_t weights = 0;  // values that are weights

  std::vector<std::int32_t> channels;             // source channels in use
  std::vector<std::int64_t> block_channel_begin;  // per channel block, into channels; one more at the end
  std::vector<RowTask> tasks;                     // per channel block, by panel
  std::vector<std::int64_t> block_task_begin;     // per channel block, into tasks; one more at the end

  std::int64_t blocks() const { return static_cast<std::int64_t>(block_task_begin.size()) - 1; }
  std::int64_t values() const { return static_cast<std::int64_t>(order.size()); }
  std::int64_t patches() const {
    return static_cast<std::int64_t>((y.patch_cuts.size() - 1) * (x.patch_cuts.size() - 1));
  }
};

struct VectorShape {
  int lanes;
  int accumulators;  // vectors that a register tile may have
  std::int64_t element_size;
  int panel = 0;     // vectors that a tile of all rows of a panel may have; 0: no panels
};

TilingProblem tiling_problem(const PassAxes& axes, const EntryList& list, std::int64_t batch, const VectorShape& vector,
                             bool weight_grad, int threads = 1);

// The best tiling of single rows or, where rows go together, of panels.
Tiling choose_tiling(const TilingProblem& problem, const EntryList& list, const VectorShape& vector);

TiledPass tiled_pass(const PassAxes& axes, const EntryList& list, const VectorShape& vector, const Tiling& tiling);

}  // namespace fedpai
