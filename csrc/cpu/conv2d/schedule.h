// SPDX-License-Identifier: Apache-2.0
// A Plan laid out for one geometry: everything that the convolution's loops would otherwise compute again each time.
//
// A *pass* is a convolution with unit step over the dest grid: for every grid position q and every entry,
//
//   dest[row, q * dest_step + dest_origin] += value * source[column, q * source_step + shift(tap)]
//
// The forward pass is one such pass (dest_step 1, source_step = stride). The input gradient of a strided convolution
// is stride_h * stride_w of them, one per residue of the input pixel, each with the taps that reach that residue.
// The weight gradient walks the forward pass, with a tiling of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv2d/kernels.h"
#include "cpu/conv2d/tiling.h"
#include "plan/plan.h"

namespace fedpai {

struct Conv2dGeometry {
  std::int64_t batch;
  std::int64_t in_h, in_w;
  std::int64_t out_h, out_w;
  std::int64_t stride_h, stride_w;
  std::int64_t pad_top, pad_left;
  std::int64_t dilation_h, dilation_w;

  bool operator==(const Conv2dGeometry& o) const {
    return batch == o.batch && in_h == o.in_h && in_w == o.in_w && out_h == o.out_h && out_w == o.out_w &&
           stride_h == o.stride_h && stride_w == o.stride_w && pad_top == o.pad_top && pad_left == o.pad_left &&
           dilation_h == o.dilation_h && dilation_w == o.dilation_w;
  }
};

// One spatial axis of a pass, and where its taps land in a packed patch. A source step s > 1 is removed by packing the
// residues of the source coordinate one after the other: tap shift d has residue d % s and moves by d / s inside it.
struct PassAxis {
  std::int64_t grid = 0;
  std::int64_t dest_step = 1, dest_origin = 0;
  std::int64_t source_step = 1;
  std::int64_t source_extent = 0;
  std::int64_t first_shift = 0;  // smallest shift in use

  struct Residue {
    std::int64_t residue;
    std::int64_t halo;  // positions needed beyond a patch's own
    std::int64_t slot;  // first packed position
  };
  std::vector<Residue> residues;
  std::int64_t slots = 0;               // packed positions of a full patch
  std::vector<std::int64_t> tap_slot;   // per kernel position along this axis; -1 where no entry uses it

  std::vector<std::int64_t> cuts;        // register tiles: starts and the end
  std::vector<std::int64_t> patch_cuts;  // patches: indices into cuts
};

struct Pass {
  PassAxis y, x;
  Tiling tiling;
  std::int64_t dest_channels = 0;
  std::int64_t lane_group = 0;  // images per lane group, and elements per packed pixel
  std::int64_t source_row = 0;  // elements between packed rows
  std::int64_t plane = 0;       // elements between packed channels

  // Entries in walking order: by channel block, dest channel, source channel.
  std::vector<std::int32_t> offset;  // element offset in the packed block
  std::vector<std::int32_t> order;   // index into the packed values
  bool order_is_identity = false;

  std::vector<std::int32_t> channels;             // source channels in use
  std::vector<std::int64_t> block_channel_begin;  // per channel block, into channels; one more at the end
  std::vector<RowTask> tasks;                     // per channel block, by dest channel
  std::vector<std::int64_t> block_task_begin;     // per channel block, into tasks; one more at the end

  std::int64_t blocks() const { return static_cast<std::int64_t>(block_task_begin.size()) - 1; }
  std::int64_t entries() const { return static_cast<std::int64_t>(offset.size()); }
  std::int64_t patches() const {
    return static_cast<std::int64_t>((y.patch_cuts.size() - 1) * (x.patch_cuts.size() - 1));
  }
};

struct VectorShape {
  int lanes;
  int accumulators;
  std::int64_t element_size;
};

// `tiling` overrides the cost model's choice: for experiments.
Pass forward_pass(const Plan& plan, const Conv2dGeometry& geometry, const VectorShape& vector,
                  const Tiling* tiling = nullptr);
Pass weight_grad_pass(const Plan& plan, const Conv2dGeometry& geometry, const VectorShape& vector,
                      const Tiling* tiling = nullptr);
std::vector<Pass> input_grad_passes(const Plan& plan, const Conv2dGeometry& geometry, const VectorShape& vector);

}  // namespace fedpai
