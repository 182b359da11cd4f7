// SPDX-License-Identifier: Apache-2.0
#include "cuda/conv2d/streams.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>

namespace fedpai::cuda {
namespace {

// Rounded towards minus infinity.
std::int32_t floor_divide(std::int32_t dividend, std::int32_t divisor) {
  return dividend / divisor - static_cast<std::int32_t>(dividend % divisor < 0);
}

std::int32_t residue(std::int32_t dividend, std::int32_t divisor) {
  return dividend - floor_divide(dividend, divisor) * divisor;
}

Entry entry_at(const EntryList& list, std::size_t i, std::int32_t dy, std::int32_t dx) {
  return {list.column[i], dy, dx, list.value[i]};
}

// The entries of `list`, dealt to passes by place_of(tap, entry's dy, entry's dx) -> pass.
template <class F>
RowStream row_stream(const EntryList& list, std::int32_t passes, const F& place_of) {
  RowStream stream;
  stream.rows = static_cast<std::int32_t>(list.rows());
  stream.passes = passes;
  const auto rows = static_cast<std::size_t>(stream.rows), stride = rows + 1;
  stream.row_begin.assign(static_cast<std::size_t>(passes) * stride, 0);
  const auto each = [&](const auto& visit) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (auto i = static_cast<std::size_t>(list.row_begin[row]); i < static_cast<std::size_t>(list.row_begin[row + 1]); ++i) {
        std::int32_t dy, dx;
        const auto pass = static_cast<std::size_t>(place_of(list.tap[i], dy, dx));
        visit(pass * stride + row, entry_at(list, i, dy, dx));
      }
    }
  };
  each([&](std::size_t at, const Entry&) { ++stream.row_begin[at]; });
  // Each count becomes where its entries begin; behind the last row of a pass, where they end.
  std::int32_t next = 0;
  for (std::int32_t& begin : stream.row_begin) next += std::exchange(begin, next);
  std::vector<std::int32_t> cursor = stream.row_begin;
  stream.entries.resize(static_cast<std::size_t>(list.size()));
  each([&](std::size_t at, const Entry& entry) { stream.entries[static_cast<std::size_t>(cursor[at]++)] = entry; });

  stream.row_order.resize(static_cast<std::size_t>(passes) * rows);
  for (std::size_t pass = 0; pass < static_cast<std::size_t>(passes); ++pass) {
    const std::int32_t* const begin = stream.row_begin.data() + pass * stride;
    const auto order = stream.row_order.begin() + static_cast<std::ptrdiff_t>(pass * rows);
    std::iota(order, order + static_cast<std::ptrdiff_t>(rows), 0);
    std::stable_sort(order, order + static_cast<std::ptrdiff_t>(rows),
                     [&](std::int32_t a, std::int32_t b) { return begin[a + 1] - begin[a] > begin[b + 1] - begin[b]; });
  }
  return stream;
}

}  // namespace

RowStream forward_stream(const Plan& plan, const Spread& s) {
  const auto width = static_cast<std::int32_t>(plan.shape().kernel_w);
  return row_stream(plan.by_output(), 1, [&](std::int32_t tap, std::int32_t& dy, std::int32_t& dx) {
    dy = tap / width * s.dilation_h - s.pad_top;
    dx = tap % width * s.dilation_w - s.pad_left;
    return 0;
  });
}

RowStream input_grad_stream(const Plan& plan, const Spread& s) {
  const auto width = static_cast<std::int32_t>(plan.shape().kernel_w);
  // Input pixel h meets output pixel p where p * stride = h + pad - r * dilation; with h = q * stride + residue,
  // p = q + (residue + pad - r * dilation) / stride.
  return row_stream(plan.by_input(), s.stride_h * s.stride_w, [&](std::int32_t tap, std::int32_t& dy, std::int32_t& dx) {
    const std::int32_t back_y = s.pad_top - tap / width * s.dilation_h, back_x = s.pad_left - tap % width * s.dilation_w;
    const std::int32_t residue_y = residue(-back_y, s.stride_h), residue_x = residue(-back_x, s.stride_w);
    dy = floor_divide(residue_y + back_y, s.stride_h);
    dx = floor_divide(residue_x + back_x, s.stride_w);
    return residue_y * s.stride_w + residue_x;
  });
}

GroupStream weight_grad_stream(const Plan& plan, const Spread& spread) {
  const RowStream by_row = forward_stream(plan, spread);
  const auto rows = static_cast<std::size_t>(by_row.rows);
  const auto columns = static_cast<std::int32_t>(plan.by_output().columns);
  // Blocks so wide that a row has three quarters of a group in each, on average: most rows then have one group there.
  const std::int64_t wide = 3 * kGroupEntries * plan.shape().in_channels_per_group * by_row.rows / (4 * plan.nnz());
  const auto width = static_cast<std::int32_t>(std::clamp<std::int64_t>(wide, 1, columns));

  GroupStream stream;
  stream.entries.reserve(by_row.entries.size());
  std::vector<std::int32_t> cursor(by_row.row_begin.begin(), by_row.row_begin.end() - 1);
  std::vector<char> seen(rows, 0);
  const auto add_group = [&](std::size_t row, std::int32_t count) {
    stream.groups.push_back({static_cast<std::int32_t>(row), static_cast<std::int32_t>(stream.entries.size()), count,
                             seen[row] == 0 ? 1 : 0});
    seen[row] = 1;
    for (std::int32_t k = 0; k < count; ++k) stream.entries.push_back(by_row.entries[static_cast<std::size_t>(cursor[row]++)]);
  };
  for (std::int64_t first = 0; first < columns; first += width) {
    for (std::size_t row = 0; row < rows; ++row) {
      std::int32_t left = 0;
      const std::int32_t end = by_row.row_begin[row + 1];
      while (cursor[row] + left < end && by_row.entries[static_cast<std::size_t>(cursor[row] + left)].column < first + width) ++left;
      // Cut evenly rather than into full groups and a rest.
      for (std::int32_t pieces = (left + kGroupEntries - 1) / kGroupEntries; pieces > 0; --pieces) {
        const std::int32_t count = (left + pieces - 1) / pieces;
        add_group(row, count);
        left -= count;
      }
    }
  }
  for (std::size_t row = 0; row < rows; ++row) {
    if (seen[row] == 0) add_group(row, 0);
  }
  return stream;
}

}  // namespace fedpai::cuda
