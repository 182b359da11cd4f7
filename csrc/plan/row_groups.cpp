// SPDX-License-Identifier: Apache-2.0
#include "plan/row_groups.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>

#include "plan/plan.h"

namespace fedpai {

namespace {

// The entries of one row, in ascending order of (column, tap).
struct Row {
  const std::int32_t* column;
  const std::int32_t* tap;
  const std::int32_t* value;
  std::int64_t size;
};

Row row_of(const EntryList& list, std::int64_t row) {
  const std::int32_t begin = list.row_begin[static_cast<std::size_t>(row)];
  const std::int32_t end = list.row_begin[static_cast<std::size_t>(row) + 1];
  return {list.column.data() + begin, list.tap.data() + begin, list.value.data() + begin, end - begin};
}

bool same_pattern(const Row& a, const Row& b) {
  const std::size_t bytes = static_cast<std::size_t>(a.size) * sizeof(std::int32_t);
  return a.size == b.size && std::memcmp(a.column, b.column, bytes) == 0 && std::memcmp(a.tap, b.tap, bytes) == 0;
}

// Visits the entries of up to kMaxPanelHeight rows in order, those at one place together: visit(column, tap, values), a
// value per row; no more than `most`.
template <class F>
void for_each_of_all(const Row* rows, int count, std::int64_t most, F&& visit) {
  std::array<std::int64_t, kMaxPanelHeight> at{};
  std::array<std::int32_t, kMaxPanelHeight> values{};
  for (std::int64_t visited = 0; visited < most; ++visited) {
    int first = -1;
    const auto before = [&](int a, int b) {
      const std::int64_t i = at[static_cast<std::size_t>(a)], j = at[static_cast<std::size_t>(b)];
      return rows[a].column[i] != rows[b].column[j] ? rows[a].column[i] < rows[b].column[j]
                                                    : rows[a].tap[i] < rows[b].tap[j];
    };
    for (int r = 0; r < count; ++r) {
      if (at[static_cast<std::size_t>(r)] < rows[r].size && (first < 0 || before(r, first))) first = r;
    }
    if (first < 0) return;
    const std::int64_t here = at[static_cast<std::size_t>(first)];
    const std::int32_t column = rows[first].column[here], tap = rows[first].tap[here];
    for (int r = 0; r < count; ++r) {
      std::int64_t& i = at[static_cast<std::size_t>(r)];
      const bool present = i < rows[r].size && rows[r].column[i] == column && rows[r].tap[i] == tap;
      values[static_cast<std::size_t>(r)] = present ? rows[r].value[i++] : kNoValue;
    }
    visit(column, tap, values);
  }
}

// Rows of a chunk of neighbours, aligned to the height of a panel.
struct Chunk {
  std::array<std::int32_t, kMaxPanelHeight> row{};
  int size = 0;
  std::int64_t weights = 0, together = 0;  // entries of the rows one by one, and of all, each counted once

  // The share of a panel's values that would be weights.
  double filled() const { return static_cast<double>(weights) / static_cast<double>(size * std::max<std::int64_t>(1, together)); }
};

// Of the first `most` entries.
Chunk chunk_of(const EntryList& list, const std::int32_t* rows, int size, std::int64_t most) {
  Chunk chunk;
  chunk.size = size;
  std::array<Row, kMaxPanelHeight> entries{};
  for (int r = 0; r < size; ++r) {
    chunk.row[static_cast<std::size_t>(r)] = rows[r];
    entries[static_cast<std::size_t>(r)] = row_of(list, rows[r]);
  }
  for_each_of_all(entries.data(), size, most, [&](std::int32_t, std::int32_t, const auto& values) {
    ++chunk.together;
    for (int r = 0; r < size; ++r) chunk.weights += values[static_cast<std::size_t>(r)] != kNoValue;
  });
  return chunk;
}

// A panel of four rows takes 0.55 of the time of four single ones with as many values.
constexpr double kWorthPadding = 0.65;
constexpr std::size_t kSampledChunks = 8;
constexpr std::int64_t kSampledEntries = 24;

// Chunks of `lone` rows, which are like no other, that are nearly alike: none where a sample of them is not.
std::vector<Chunk> padded_chunks(const EntryList& list, const std::vector<std::int32_t>& lone) {
  std::vector<std::size_t> starts;  // into lone
  for (std::size_t i = 0; i < lone.size(); ++i) {
    if (i == 0 || lone[i] / kMaxPanelHeight != lone[i - 1] / kMaxPanelHeight) starts.push_back(i);
  }
  starts.push_back(lone.size());
  const std::size_t chunks = starts.size() - 1;
  const auto chunk = [&](std::size_t c, std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
    return chunk_of(list, lone.data() + starts[c], static_cast<int>(starts[c + 1] - starts[c]), most);
  };
  bool any = false;
  for (std::size_t s = 0; s < std::min(chunks, kSampledChunks) && !any; ++s) {
    const Chunk sample = chunk(s * chunks / std::min(chunks, kSampledChunks), kSampledEntries);
    any = sample.size > 1 && sample.filled() >= kWorthPadding;
  }
  std::vector<Chunk> found;
  for (std::size_t c = 0; c < chunks && any; ++c) {
    const Chunk here = chunk(c);
    if (here.size > 1 && here.filled() >= kWorthPadding) found.push_back(here);
  }
  return found;
}

}  // namespace

RowGroups find_row_groups(const EntryList& list) {
  // Rows of one pattern become neighbours when sorted by how many entries they have and where some of these are.
  struct Key {
    std::uint64_t likeness;
    std::int32_t row;
  };
  std::vector<Key> keys(static_cast<std::size_t>(list.rows()));
  for (std::size_t r = 0; r < keys.size(); ++r) {
    const Row row = row_of(list, static_cast<std::int64_t>(r));
    std::uint64_t likeness = 0;
    const auto mix = [&](std::int32_t n) { likeness = (likeness ^ static_cast<std::uint32_t>(n)) * 0x9e3779b97f4a7c15u; };
    mix(static_cast<std::int32_t>(row.size));
    if (row.size > 0) {
      for (const std::int64_t at : {std::int64_t{0}, row.size / 2, row.size - 1}) mix(row.column[at]), mix(row.tap[at]);
    }
    keys[r] = {likeness, static_cast<std::int32_t>(r)};
  }
  std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
    return a.likeness != b.likeness ? a.likeness < b.likeness : a.row < b.row;
  });

  struct Group {
    std::vector<std::int32_t> rows;
    std::int32_t entries;
  };
  std::vector<Group> groups;
  std::vector<std::int32_t> lone;
  for (std::size_t i = 0; i < keys.size();) {
    const Row first = row_of(list, keys[i].row);
    std::size_t next = i + 1;
    while (next < keys.size() && same_pattern(first, row_of(list, keys[next].row))) ++next;
    if (next == i + 1 && first.size > 0) {
      lone.push_back(keys[i].row);
    } else {
      Group group{{}, static_cast<std::int32_t>(first.size)};
      for (std::size_t j = i; j < next; ++j) group.rows.push_back(keys[j].row);
      groups.push_back(std::move(group));
    }
    i = next;
  }
  std::sort(lone.begin(), lone.end());
  std::vector<char> taken(keys.size(), 0);
  for (const Chunk& chunk : padded_chunks(list, lone)) {
    groups.push_back({{chunk.row.begin(), chunk.row.begin() + chunk.size}, static_cast<std::int32_t>(chunk.together)});
    for (const std::int32_t row : groups.back().rows) taken[static_cast<std::size_t>(row)] = 1;
  }
  // Dests are best visited in the order in which they lie: groups and lone rows by their first row.
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.rows.front() < b.rows.front(); });

  RowGroups result;
  result.rows.reserve(keys.size());
  result.group_begin.reserve(keys.size() + 1);
  result.entries.reserve(keys.size());
  result.group_begin.push_back(0);
  const auto close = [&](std::int64_t entries) {
    result.group_begin.push_back(static_cast<std::int32_t>(result.rows.size()));
    result.entries.push_back(static_cast<std::int32_t>(entries));
  };
  auto next = groups.begin();
  const auto add_groups_before = [&](std::int32_t row) {
    for (; next != groups.end() && next->rows.front() < row; ++next) {
      result.rows.insert(result.rows.end(), next->rows.begin(), next->rows.end());
      close(next->entries);
      if (next->rows.size() == 1 || next->entries == 0) continue;
      result.largest = std::max(result.largest, static_cast<std::int64_t>(next->rows.size()));
      for (const std::int32_t member : next->rows) result.shared += row_of(list, member).size;
    }
  };
  for (const std::int32_t row : lone) {
    if (taken[static_cast<std::size_t>(row)] != 0) continue;
    add_groups_before(row);
    result.rows.push_back(row);
    close(row_of(list, row).size);
  }
  add_groups_before(std::numeric_limits<std::int32_t>::max());
  return result;
}

namespace {

// Calls visit(first row, rows) for each panel of a group of `size` rows: as equal as possible, none above `height`.
template <class F>
void cut_group(std::int64_t size, int height, F&& visit) {
  const std::int64_t parts = (size + height - 1) / height;
  for (std::int64_t p = 0; p < parts; ++p) visit(size * p / parts, size * (p + 1) / parts - size * p / parts);
}

}  // namespace

PanelCounts count_panels(const EntryList& list, int height) {
  PanelCounts counts;
  if (height == 1) {
    counts.panels[0] = list.rows();
    counts.entries[0] = list.size();
    return counts;
  }
  for (std::int64_t g = 0; g < list.groups.count(); ++g) {
    cut_group(list.groups.size(g), height, [&](std::int64_t, std::int64_t rows) {
      ++counts.panels[rows - 1];
      counts.entries[rows - 1] += list.groups.entries[static_cast<std::size_t>(g)];
    });
  }
  return counts;
}

Panels::Panels(const EntryList& list, int height) {
  if (height == 1) {
    rows.resize(static_cast<std::size_t>(list.rows()));
    std::iota(rows.begin(), rows.end(), 0);
    row_begin = rows;
    row_begin.push_back(static_cast<std::int32_t>(rows.size()));
    entry_begin = value_begin = list.row_begin.data();
    column = list.column.data();
    tap = list.tap.data();
    value = list.value.data();
    return;
  }
  row_begin.push_back(0);
  for (int wanted = height; wanted >= 1; --wanted) {
    for (std::int64_t g = 0; g < list.groups.count(); ++g) {
      const std::int32_t begin = list.groups.group_begin[static_cast<std::size_t>(g)];
      cut_group(list.groups.size(g), height, [&](std::int64_t first, std::int64_t count) {
        if (count != wanted) return;
        const auto from = list.groups.rows.begin() + begin + first;
        rows.insert(rows.end(), from, from + count);
        row_begin.push_back(static_cast<std::int32_t>(rows.size()));
      });
    }
  }
  own_entry_begin_.push_back(0);
  own_value_begin_.push_back(0);
  own_column_.reserve(list.column.size());
  own_tap_.reserve(list.column.size());
  own_value_.reserve(list.column.size());
  for (std::int64_t p = 0; p < count(); ++p) merge(list, p);
  entry_begin = own_entry_begin_.data();
  value_begin = own_value_begin_.data();
  column = own_column_.data();
  tap = own_tap_.data();
  value = own_value_.data();
}

void Panels::merge(const EntryList& list, std::int64_t panel) {
  std::array<Row, kMaxPanelHeight> entries{};
  const int count = height(panel);
  for (int r = 0; r < count; ++r) {
    entries[static_cast<std::size_t>(r)] =
        row_of(list, rows[static_cast<std::size_t>(row_begin[static_cast<std::size_t>(panel)] + r)]);
  }
  for_each_of_all(entries.data(), count, std::numeric_limits<std::int64_t>::max(), [&](std::int32_t at_column, std::int32_t at_tap, const auto& values) {
    own_column_.push_back(at_column);
    own_tap_.push_back(at_tap);
    own_value_.insert(own_value_.end(), values.begin(), values.begin() + count);
  });
  own_entry_begin_.push_back(static_cast<std::int32_t>(own_column_.size()));
  own_value_begin_.push_back(static_cast<std::int32_t>(own_value_.size()));
}

}  // namespace fedpai
