// SPDX-License-Identifier: Apache-2.0
// The geometry of a *pass*: a convolution with unit step over its dest grid. For every grid position q and every entry,
//
//   dest[row, q * dest_step + dest_origin] += value * source[column, q * source_step + shift(tap)]
//
// The forward pass is one such pass (dest_step 1, source_step = stride). The input gradient of a strided convolution
// is stride_h * stride_w of them, one per residue of the input pixel, each with the taps that reach that residue.
// The weight gradient walks the forward pass.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

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

// One spatial axis of a pass.
struct Axis {
  std::int64_t grid = 0;
  std::int64_t dest_step = 1, dest_origin = 0;
  std::int64_t source_step = 1;
  std::int64_t source_extent = 0;

  // Per kernel position, how far it shifts the source; kNoTap where no entry of the pass uses it.
  static constexpr std::int64_t kNoTap = std::numeric_limits<std::int64_t>::min();
  std::vector<std::int64_t> shift;

  bool any_tap() const;
};

struct PassAxes {
  Axis y, x;

  bool has(std::int64_t tap) const {
    const auto width = static_cast<std::int64_t>(x.shift.size());
    return y.shift[static_cast<std::size_t>(tap / width)] != Axis::kNoTap &&
           x.shift[static_cast<std::size_t>(tap % width)] != Axis::kNoTap;
  }
};

// Only taps that occur among the plan's entries and meet the image from some grid position are kept.
PassAxes forward_axes(const Plan& plan, const Conv2dGeometry& geometry);
std::vector<PassAxes> input_grad_axes(const Plan& plan, const Conv2dGeometry& geometry);

}  // namespace fedpai
