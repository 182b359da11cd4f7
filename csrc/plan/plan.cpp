// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace fedpai {

namespace {

// Counts and finds true bytes eight at a time: at 98 % sparsity most words are zero.
template <class F>
void for_each_set(const std::uint8_t* mask, std::int64_t begin, std::int64_t end, F&& visit) {
  std::int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, mask + i, 8);
    if (word == 0) continue;
    for (std::int64_t k = 0; k < 8; ++k) {
      if (mask[i + k] != 0) visit(i + k);
    }
  }
  for (; i < end; ++i) {
    if (mask[i] != 0) visit(i);
  }
}

EntryList list_by_output(const std::uint8_t* mask, const WeightShape& shape, std::int64_t nnz) {
  EntryList list;
  list.columns = shape.in_channels();
  list.row_begin.reserve(static_cast<std::size_t>(shape.out_channels) + 1);
  list.column.reserve(static_cast<std::size_t>(nnz));
  list.tap.reserve(static_cast<std::size_t>(nnz));
  list.value.reserve(static_cast<std::size_t>(nnz));
  const std::int64_t row_numel = shape.in_channels_per_group * shape.taps();
  const std::int64_t rows_per_group = shape.out_channels / shape.groups;
  std::int32_t next = 0;
  list.row_begin.push_back(0);
  for (std::int64_t row = 0; row < shape.out_channels; ++row) {
    const std::int64_t first_column = row / rows_per_group * shape.in_channels_per_group;
    const std::int64_t begin = row * row_numel;
    for_each_set(mask, begin, begin + row_numel, [&](std::int64_t i) {
      const std::int64_t within = i - begin;
      list.column.push_back(static_cast<std::int32_t>(first_column + within / shape.taps()));
      list.tap.push_back(static_cast<std::int32_t>(within % shape.taps()));
      list.value.push_back(next++);
    });
    list.row_begin.push_back(next);
  }
  return list;
}

// A counting sort by column; stable, so that inside a column the rows stay ascending.
EntryList transpose(const EntryList& list) {
  const std::size_t size = list.column.size();
  EntryList result;
  result.columns = list.rows();
  result.row_begin.assign(static_cast<std::size_t>(list.columns) + 1, 0);
  result.column.resize(size);
  result.tap.resize(size);
  result.value.resize(size);
  for (const std::int32_t column : list.column) ++result.row_begin[static_cast<std::size_t>(column) + 1];
  for (std::size_t c = 1; c < result.row_begin.size(); ++c) result.row_begin[c] += result.row_begin[c - 1];
  std::vector<std::int32_t> next(result.row_begin.begin(), result.row_begin.end() - 1);
  for (std::int64_t row = 0; row < list.rows(); ++row) {
    for (std::int32_t j = list.row_begin[static_cast<std::size_t>(row)];
         j < list.row_begin[static_cast<std::size_t>(row) + 1]; ++j) {
      const auto from = static_cast<std::size_t>(j);
      const auto to = static_cast<std::size_t>(next[static_cast<std::size_t>(list.column[from])]++);
      result.column[to] = static_cast<std::int32_t>(row);
      result.tap[to] = list.tap[from];
      result.value[to] = list.value[from];
    }
  }
  return result;
}

}  // namespace

Plan::Plan(const std::uint8_t* mask, const WeightShape& shape) : shape_(shape) {
  if (shape.out_channels <= 0 || shape.in_channels_per_group <= 0 || shape.kernel_h <= 0 || shape.kernel_w <= 0 ||
      shape.groups <= 0) {
    throw std::invalid_argument("mask: every dimension must be positive");
  }
  if (shape.out_channels % shape.groups != 0) {
    throw std::invalid_argument("groups: " + std::to_string(shape.groups) + " does not divide the mask's " +
                                std::to_string(shape.out_channels) + " output channels");
  }
  std::int64_t nnz = 0;
  for_each_set(mask, 0, shape.numel(), [&](std::int64_t) { ++nnz; });
  if (nnz == 0) throw std::invalid_argument("mask: no weight survives; a layer needs at least one");
  if (nnz > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("mask: " + std::to_string(nnz) + " surviving weights, at most 2^31 - 1 are supported");
  }
  by_output_ = list_by_output(mask, shape, nnz);
  by_input_ = transpose(by_output_);
}

void Plan::flat_indices(std::int64_t* out) const {
  const std::int64_t row_numel = shape_.in_channels_per_group * shape_.taps();
  const std::int64_t rows_per_group = shape_.out_channels / shape_.groups;
  std::size_t j = 0;
  for (std::int64_t row = 0; row < shape_.out_channels; ++row) {
    const std::int64_t first_column = row / rows_per_group * shape_.in_channels_per_group;
    for (; j < static_cast<std::size_t>(by_output_.row_begin[static_cast<std::size_t>(row) + 1]); ++j) {
      out[j] = row * row_numel + (by_output_.column[j] - first_column) * shape_.taps() + by_output_.tap[j];
    }
  }
}

}  // namespace fedpai
