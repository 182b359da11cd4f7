// SPDX-License-Identifier: Apache-2.0
// How one pass is cut into patches, register tiles and channel blocks, chosen by a cost model.
#pragma once

#include <cstdint>

#include "plan/row_groups.h"

namespace fedpai {

// What the choice depends on. One pass walks `entries` non-zeros for every pixel of a grid_h x grid_w dest grid.
struct TilingProblem {
  std::int64_t grid_h, grid_w;
  std::int64_t halo_h, halo_w;      // packed pixels beyond a tile's own, per axis
  std::int64_t phases_h, phases_w;  // residues of the source step that are in use, per axis
  std::int64_t batch;
  std::int64_t dest_channels;
  std::int64_t source_channels;  // those with at least one entry
  std::int64_t entries;
  std::int64_t element_size;
  int lanes;
  int accumulators;  // vectors that a register tile may have
  bool weight_grad;  // one running sum per entry instead of one per dest vector
  bool rows_join;    // neighbouring pixels of a row are neighbours on both sides: no steps between columns
  int threads = 1;   // that share the pass

  // Where dest channels are walked in panels: the tallest's height, and by height - 1 how many panels there are and how
  // many entries they have. `entries` counts those of single rows, as many as there are weights.
  int height = 1;
  std::int64_t panels[kMaxPanelHeight] = {};
  std::int64_t panel_entries[kMaxPanelHeight] = {};
};

struct Tiling {
  int blocks = 1;                   // vectors of images per pixel: a lane group
  int groups = 1;                   // neighbouring lane groups packed together
  std::int64_t tile_rows = 1;       // largest register tile: rows of pixels,
  std::int64_t tile_run = 1;        // and vectors in each, which need not be whole pixels
  std::int64_t patch_rows = 1;      // a patch: rows of register tiles,
  std::int64_t patch_width = 1;     // and pixels in each
  std::int64_t channel_block = 1;   // source channels packed at a time
  std::int64_t strip = 1;           // neighbouring tiles of a row that a task visits before the next task
  int height = 1;                   // of the tallest panel
  double cycles = 0;                // the model's estimate: of all threads together, waits and what several of them do alike included

  // Whether both lay out a pass alike.
  bool operator==(const Tiling& o) const {
    return blocks == o.blocks && groups == o.groups && tile_rows == o.tile_rows && tile_run == o.tile_run &&
           patch_rows == o.patch_rows && patch_width == o.patch_width && channel_block == o.channel_block && strip == o.strip && height == o.height;
  }
};

Tiling choose_tiling(const TilingProblem& problem);

}  // namespace fedpai
