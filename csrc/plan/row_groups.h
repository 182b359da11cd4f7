// SPDX-License-Identifier: Apache-2.0
// Rows of an EntryList that go well together: those that keep the same weights.
//
// A mask of r x c blocks (over output and input channels) shows as groups of r rows in the list by output and of c rows
// in the list by input; a mask of whole channels as one group. Kernels walk the entries of such rows once for several of
// them, a *panel*, so that each loaded pixel serves every row of it. Nothing is declared: groups are found by comparing
// rows, which need not be neighbours.
//
// Neighbouring rows that differ in little form a group as well. Where a row lacks an entry of the group, its panel holds
// a zero in the value's place: such a value is no weight, and gets no gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/index_vector.h"

namespace fedpai {

struct EntryList;

struct RowGroups {
  std::vector<std::int32_t> rows;         // every row once, group by group
  std::vector<std::int32_t> group_begin;  // per group, into rows; one more at the end
  std::vector<std::int32_t> entries;      // per group: entries of all its rows together, each counted once
  std::int64_t shared = 0;                // weights of rows that are not alone in their group
  std::int64_t largest = 1;               // rows, among the groups that have entries

  std::int64_t count() const { return static_cast<std::int64_t>(entries.size()); }
  std::int64_t size(std::int64_t group) const {
    return group_begin[static_cast<std::size_t>(group) + 1] - group_begin[static_cast<std::size_t>(group)];
  }
};

RowGroups find_row_groups(const EntryList& list);

constexpr int kMaxPanelHeight = 4;
constexpr std::int32_t kNoValue = -1;

// How many panels of each height the groups are cut into, and how many entries these have; by height - 1.
struct PanelCounts {
  std::int64_t panels[kMaxPanelHeight] = {};
  std::int64_t entries[kMaxPanelHeight] = {};
};

PanelCounts count_panels(const EntryList& list, int height);

// The groups of a list, cut into panels of at most `height` rows, the tallest first. The list must outlive it.
class Panels {
 public:
  Panels(const EntryList& list, int height);
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;

  std::int64_t count() const { return static_cast<std::int64_t>(row_begin.size()) - 1; }
  int height(std::int64_t panel) const {
    const auto p = static_cast<std::size_t>(panel);
    return row_begin[p + 1] - row_begin[p];
  }
  std::int64_t entries() const { return entry_begin[row_begin.size() - 1]; }

  std::vector<std::int32_t> rows;       // every row once, panel by panel
  std::vector<std::int32_t> row_begin;  // per panel, into rows; one more at the end
  // Per panel, one more at the end: its entries, ascending by column and tap, and its values, entry by entry and in each
  // entry row by row.
  const std::int32_t* entry_begin;
  const std::int32_t* value_begin;
  const std::int32_t* column;  // per entry
  const std::int32_t* tap;
  const std::int32_t* value;  // per value: index into the packed values, or kNoValue

 private:
  void merge(const EntryList& list, std::int64_t panel);

  std::vector<std::int32_t> own_entry_begin_, own_value_begin_;
  IndexVector own_column_, own_tap_, own_value_;
};

}  // namespace fedpai
