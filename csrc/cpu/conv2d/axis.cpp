// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/axis.h"

#include <algorithm>

namespace fedpai {

namespace {

// Whether a tap reads the image from any position of the grid. One that only ever reads padding adds nothing.
bool meets_image(const Axis& axis, std::int64_t shift) {
  const std::int64_t first = shift >= 0 ? 0 : (-shift + axis.source_step - 1) / axis.source_step;
  return first < axis.grid && first * axis.source_step + shift < axis.source_extent;
}

Axis forward_axis(std::int64_t out, std::int64_t in, std::int64_t stride, std::int64_t kernel, std::int64_t dilation,
                  std::int64_t pad) {
  Axis axis;
  axis.grid = out;
  axis.source_step = stride;
  axis.source_extent = in;
  for (std::int64_t k = 0; k < kernel; ++k) {
    const std::int64_t shift = k * dilation - pad;
    axis.shift.push_back(meets_image(axis, shift) ? shift : Axis::kNoTap);
  }
  return axis;
}

// Input pixels i = q * stride + residue; out pixel o reaches i through tap k when o * stride + k * dilation - pad == i,
// that is o = q + (residue + pad - k * dilation) / stride, where the division leaves no rest.
Axis input_grad_axis(std::int64_t in, std::int64_t out, std::int64_t stride, std::int64_t residue, std::int64_t kernel,
                     std::int64_t dilation, std::int64_t pad) {
  Axis axis;
  axis.grid = (in - residue + stride - 1) / stride;
  axis.dest_step = stride;
  axis.dest_origin = residue;
  axis.source_extent = out;
  for (std::int64_t k = 0; k < kernel; ++k) {
    const std::int64_t distance = residue + pad - k * dilation;
    const bool reaches = distance % stride == 0 && meets_image(axis, distance / stride);
    axis.shift.push_back(reaches ? distance / stride : Axis::kNoTap);
  }
  return axis;
}

void drop_unused_taps(PassAxes& axes, const EntryList& list) {
  const std::size_t width = axes.x.shift.size();
  std::vector<char> used_y(axes.y.shift.size(), 0), used_x(width, 0);
  std::vector<char> used(axes.y.shift.size() * width, 0);
  std::size_t missing = used.size();
  for (std::size_t j = 0; j < list.tap.size() && missing > 0; ++j) {
    char& seen = used[static_cast<std::size_t>(list.tap[j])];
    missing -= seen == 0;
    seen = 1;
  }
  for (std::size_t tap = 0; tap < used.size(); ++tap) {
    if (used[tap] != 0 && axes.has(static_cast<std::int64_t>(tap))) used_y[tap / width] = used_x[tap % width] = 1;
  }
  for (std::size_t k = 0; k < used_y.size(); ++k) {
    if (used_y[k] == 0) axes.y.shift[k] = Axis::kNoTap;
  }
  for (std::size_t k = 0; k < width; ++k) {
    if (used_x[k] == 0) axes.x.shift[k] = Axis::kNoTap;
  }
}

}  // namespace

bool Axis::any_tap() const {
  return std::any_of(shift.begin(), shift.end(), [](std::int64_t s) { return s != kNoTap; });
}

PassAxes forward_axes(const Plan& plan, const Conv2dGeometry& g) {
  const WeightShape& shape = plan.shape();
  PassAxes axes{forward_axis(g.out_h, g.in_h, g.stride_h, shape.kernel_h, g.dilation_h, g.pad_top),
                forward_axis(g.out_w, g.in_w, g.stride_w, shape.kernel_w, g.dilation_w, g.pad_left)};
  drop_unused_taps(axes, plan.by_output());
  return axes;
}

std::vector<PassAxes> input_grad_axes(const Plan& plan, const Conv2dGeometry& g) {
  const WeightShape& shape = plan.shape();
  std::vector<PassAxes> passes;
  for (std::int64_t ry = 0; ry < std::min(g.stride_h, g.in_h); ++ry) {
    for (std::int64_t rx = 0; rx < std::min(g.stride_w, g.in_w); ++rx) {
      PassAxes axes{input_grad_axis(g.in_h, g.out_h, g.stride_h, ry, shape.kernel_h, g.dilation_h, g.pad_top),
                    input_grad_axis(g.in_w, g.out_w, g.stride_w, rx, shape.kernel_w, g.dilation_w, g.pad_left)};
      drop_unused_taps(axes, plan.by_input());
      passes.push_back(std::move(axes));
    }
  }
  return passes;
}

}  // namespace fedpai
