// SPDX-License-Identifier: Apache-2.0
// A Plan as the CUDA convolution walks it: index streams that are built on the host, copied to a device once, and serve
// every batch and image size. They depend on the mask and on stride, padding and dilation.
//
// A direction is made of *passes* over grids of pixels q with
//
//   dest[row, q * dest_step + origin] += value * source[column, q * source_step + (dy, dx)]
//
// The forward pass is one (source_step = stride, origin 0, (dy, dx) = tap * dilation - padding). The input gradient is
// one per residue of the input pixel to the stride (dest_step = stride, origin = residue): a tap reaches exactly one
// residue of each axis, so the passes share the entries out among them. Offsets are kept in channels and pixels; the
// kernels scale them to elements as they stage them, once for the whole warp.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace fedpai::cuda {

struct Spread {
  std::int32_t stride_h, stride_w;
  std::int32_t pad_top, pad_left;
  std::int32_t dilation_h, dilation_w;
};

// One surviving weight.
struct alignas(16) Entry {
  std::int32_t column;  // channel of the source
  std::int32_t dy, dx;  // how far its pixel is from the grid's, in pixels
  std::int32_t value;   // index into the packed values
};

// Entries by pass, then by row, then by ascending column.
struct RowStream {
  std::int32_t rows = 0;
  std::int32_t passes = 0;
  std::vector<Entry> entries;
  std::vector<std::int32_t> row_begin;  // [passes][rows + 1], into entries
  std::vector<std::int32_t> row_order;  // [passes][rows]: rows by falling number of entries
};

// Up to kGroupEntries entries of one row that one warp reduces together.
constexpr int kGroupEntries = 8;
struct alignas(16) Group {
  std::int32_t row;
  std::int32_t begin, count;   // into entries
  std::int32_t first_of_row;   // 1 for one group of each row, which sums the bias gradient; rows without entries have it too
};

// Entries by blocks of columns, in them by row: groups that are neighbours read the same columns, and few rows each.
struct GroupStream {
  std::vector<Entry> entries;
  std::vector<Group> groups;
};

RowStream forward_stream(const Plan& plan, const Spread& spread);
RowStream input_grad_stream(const Plan& plan, const Spread& spread);
GroupStream weight_grad_stream(const Plan& plan, const Spread& spread);

}  // namespace fedpai::cuda
