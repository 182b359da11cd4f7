// SPDX-License-Identifier: Apache-2.0
// A Plan is a mask, compiled: which weights exist, in the two orders that the kernels walk them.
//
// The weight is (dest channels, source channels per group, kernel rows, kernel columns); a linear layer's is
// (outputs, inputs, 1, 1). Values live elsewhere, packed: value i belongs to the i-th true element of the mask in
// row-major order, so packing is dense[mask] and the order is the same on every machine.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/index_vector.h"
#include "plan/row_groups.h"

namespace fedpai {

struct WeightShape {
  std::int64_t out_channels;
  std::int64_t in_channels_per_group;
  std::int64_t kernel_h;
  std::int64_t kernel_w;
  std::int64_t groups;

  std::int64_t in_channels() const { return in_channels_per_group * groups; }
  std::int64_t taps() const { return kernel_h * kernel_w; }
  std::int64_t numel() const { return out_channels * in_channels_per_group * taps(); }
};

// The mask's non-zeros sorted by row, and inside a row by column: the rows are the channels of one side, the columns
// those of the other. Every array but row_begin has one element per non-zero.
struct EntryList {
  std::vector<std::int32_t> row_begin;  // rows + 1
  IndexVector column;                   // channel on the other side
  IndexVector tap;                      // ky * kernel_w + kx
  IndexVector value;                    // index into the packed values
  std::int64_t columns = 0;             // how many channels the other side has
  RowGroups groups;

  std::int64_t rows() const { return static_cast<std::int64_t>(row_begin.size()) - 1; }
  std::int64_t size() const { return static_cast<std::int64_t>(column.size()); }
};

class Plan {
 public:
  // `mask` holds shape.numel() bytes, row-major, zero or not. Throws std::invalid_argument when the shape is not
  // positive or does not fit 31 bits, groups does not divide the output channels, no weight survives, or more than
  // 2^31 - 1 do.
  Plan(const std::uint8_t* mask, const WeightShape& shape);

  const WeightShape& shape() const { return shape_; }
  std::int64_t nnz() const { return by_output_.size(); }
  const EntryList& by_output() const { return by_output_; }  // rows are output channels: forward and weight gradient
  const EntryList& by_input() const { return by_input_; }    // rows are input channels: input gradient

  // Row-major positions of the surviving weights, ascending.
  void flat_indices(std::int64_t* out) const;

 private:
  WeightShape shape_;
  EntryList by_output_;
  EntryList by_input_;
};

}  // namespace fedpai
