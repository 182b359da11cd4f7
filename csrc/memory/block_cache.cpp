// SPDX-License-Identifier: Apache-2.0
#include "memory/block_cache.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <new>
#include <tuple>

namespace fedpai {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;
// Of address space, where the system grants as much: few segments, so that few ends of segments are wasted.
constexpr std::size_t kSegment = std::size_t{sizeof(void*) >= 8 ? 1024 : 64} << 20;

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  if (bytes > std::numeric_limits<std::size_t>::max() - kLargePage - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

// Whole large pages where that wastes little; else the end of the last one is left to other blocks.
std::size_t size_of_block(std::size_t bytes) {
  const std::size_t large = round_up(bytes, kLargePage);
  return large - bytes <= bytes / 8 ? large : round_up(bytes, page_size());
}

// Of blocks of that size.
std::size_t alignment_of(std::size_t size) { return size >= kLargePage ? kLargePage : page_size(); }

char* align_down(char* at, std::size_t alignment) { return at - reinterpret_cast<std::uintptr_t>(at) % alignment; }

// Address space that takes memory as it is written to, aligned to large pages. Null when there is none.
char* map(std::size_t size) noexcept {
  const std::size_t surplus = kLargePage - page_size();
  void* const mapped =
      mmap(nullptr, size + surplus, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, /*offset=*/0);
  if (mapped == MAP_FAILED) return nullptr;

  auto* const begin = static_cast<char*>(mapped);
  char* const data = align_down(begin + surplus, kLargePage);
  const auto before = static_cast<std::size_t>(data - begin);
  if (before > 0) munmap(begin, before);
  if (surplus > before) munmap(data + size, surplus - before);
#ifdef MADV_HUGEPAGE
  // Only worth it for memory that is kept: the first touch of a large page costs more, every later one less. A system
  // that refuses leaves small pages.
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

// Gives the memory back and keeps the addresses. Memory that the program has locked stays.
void drop(char* data, std::size_t size) noexcept {
#ifdef __linux__
  madvise(data, size, MADV_DONTNEED);
#else
  // Elsewhere the advice does not promise that the memory goes at once.
  mmap(data, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, /*fd=*/-1, /*offset=*/0);
#endif
}

}  // namespace

BlockCache::~BlockCache() {
  for (const auto& [data, segment] : segments_) munmap(data, segment.size);
}

Block BlockCache::allocate(std::size_t bytes) {
  const std::size_t size = size_of_block(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (++allocations_ % kWindow == 0) begin_window();
  Place place = best_place(size);
  if (place.data == nullptr) {
    if (!add_segment(size)) {
      release_all();
      if (!add_segment(size)) throw std::bad_alloc();
    }
    place = best_place(size);
  }
  take(place.data, size);
  ++(place.fresh == 0 ? stats_.hits : stats_.misses);
  stats_.live_bytes += size;
  window_peak_ = std::max(window_peak_, stats_.live_bytes);
  stats_.peak_live_bytes = std::max(stats_.peak_live_bytes, stats_.live_bytes);
  if (place.fresh > 0) trim();
  return Block{place.data, size};
}

void BlockCache::free(Block block) noexcept {
  auto* const data = static_cast<char*>(block.data);
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.live_bytes -= block.size;
  try {
    const auto range = free_.emplace(data, Range{block.size, 0}).first;
    try {
      cached_.emplace(data, Range{block.size, ++frees_});
      stats_.cached_bytes += block.size;
    } catch (const std::bad_alloc&) {
      drop(data, block.size);  // no memory for a note that it has memory
    }
    join(range);
  } catch (const std::bad_alloc&) {
    drop(data, block.size);  // no memory for a note of the addresses: they are lost, the memory is not
  }
}

void BlockCache::empty() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  release_all();
}

BlockCacheStats BlockCache::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void BlockCache::set_slack(double slack) {
  const std::lock_guard<std::mutex> lock(mutex_);
  slack_ = slack;
}

// Data is null when no free range is large enough.
BlockCache::Place BlockCache::best_place(std::size_t size) const {
  const std::size_t alignment = alignment_of(size);
  Place best{nullptr, std::numeric_limits<std::size_t>::max(), 0, 0};
  for (const auto& [begin, range] : free_) {
    if (range.size < size) continue;
    const std::size_t left = range.size - size;
    if (best.fresh == 0 && left > best.left) continue;
    char* const last = align_down(begin + left, alignment);
    char* const first = align_down(begin + alignment - 1, alignment);
    if (last < begin) continue;  // nothing aligned in it
    for (char* const data : {first, last}) {
      const Place place = place_at(data, size, left);
      // Both ends alike: the first.
      const auto order = [](const Place& p) { return std::make_tuple(p.fresh, p.left, ~p.freed); };
      if (best.data == nullptr || order(place) < order(best)) best = place;
      if (first == last) break;
    }
  }
  return best;
}

BlockCache::Place BlockCache::place_at(char* data, std::size_t size, std::size_t left) const {
  Place place{data, size, left, 0};
  auto cached = cached_.upper_bound(data);
  if (cached != cached_.begin()) --cached;
  for (; cached != cached_.end() && cached->first < data + size; ++cached) {
    char* const begin = std::max(cached->first, data);
    char* const end = std::min(cached->first + cached->second.size, data + size);
    if (begin >= end) continue;
    place.fresh -= static_cast<std::size_t>(end - begin);
    place.freed = std::max(place.freed, cached->second.freed);
  }
  return place;
}

// False when the system refuses.
bool BlockCache::add_segment(std::size_t least) {
  least = round_up(least, kLargePage);
  for (std::size_t size = std::max(least, kSegment);; size = std::max(least, size / 2)) {
    if (char* const data = map(size); data != nullptr) {
      try {
        free_.emplace(data, Range{size, 0});
        segments_.emplace(data, Range{size, 0});
      } catch (const std::bad_alloc&) {
        free_.erase(data);
        munmap(data, size);
        throw;
      }
      return true;
    }
    if (size == least) return false;
  }
}

// Leaves no range on both sides of `at`.
void BlockCache::split(Ranges& ranges, char* at) {
  auto after = ranges.upper_bound(at);
  if (after == ranges.begin()) return;
  const auto range = std::prev(after);
  const auto front = static_cast<std::size_t>(at - range->first);
  if (front == 0 || front >= range->second.size) return;
  ranges.emplace_hint(after, at, Range{range->second.size - front, range->second.freed});
  range->second.size = front;
}

// Takes the bytes out of free_ and cached_.
void BlockCache::take(char* data, std::size_t size) {
  // Without memory for a note this throws, and what is split stays so, which harms little.
  for (Ranges* const ranges : {&free_, &cached_}) {
    split(*ranges, data);
    split(*ranges, data + size);
  }
  free_.erase(data);
  for (auto cached = cached_.lower_bound(data); cached != cached_.end() && cached->first < data + size;) {
    stats_.cached_bytes -= cached->second.size;
    cached = cached_.erase(cached);
  }
}

// With the free ranges before and behind it. Segments may lie side by side by chance, but are unmapped one by one.
void BlockCache::join(Ranges::iterator range) noexcept {
  const auto next = std::next(range);
  if (next != free_.end() && range->first + range->second.size == next->first && segments_.count(next->first) == 0) {
    range->second.size += next->second.size;
    free_.erase(next);
  }
  if (range == free_.begin() || segments_.count(range->first) > 0) return;
  const auto before = std::prev(range);
  if (before->first + before->second.size == range->first) {
    before->second.size += range->second.size;
    free_.erase(range);
  }
}

void BlockCache::begin_window() noexcept {
  former_peak_ = window_peak_;
  window_peak_ = stats_.live_bytes;
  trim();
  unmap_unused();
}

// Gives back what is above the limit.
void BlockCache::trim() noexcept {
  const auto limit = static_cast<std::size_t>(slack_ * static_cast<double>(std::max(former_peak_, window_peak_)));
  while (!cached_.empty() && stats_.live_bytes + stats_.cached_bytes > limit) {
    release(std::min_element(cached_.begin(), cached_.end(),
                             [](const auto& a, const auto& b) { return a.second.freed < b.second.freed; }));
  }
}

void BlockCache::release_all() noexcept {
  while (!cached_.empty()) release(cached_.begin());
  unmap_unused();
}

void BlockCache::release(Ranges::iterator cached) noexcept {
  drop(cached->first, cached->second.size);
  stats_.cached_bytes -= cached->second.size;
  cached_.erase(cached);
}

// Segments without blocks and without memory.
void BlockCache::unmap_unused() noexcept {
  for (auto segment = segments_.begin(); segment != segments_.end();) {
    const auto [data, range] = *segment;
    const auto whole = free_.find(data);
    const auto cached = cached_.lower_bound(data);
    if (whole == free_.end() || whole->second.size != range.size ||
        (cached != cached_.end() && cached->first < data + range.size)) {
      ++segment;
      continue;
    }
    free_.erase(whole);
    segment = segments_.erase(segment);
    munmap(data, range.size);
  }
}

BlockCache& block_cache() {
  static BlockCache* const cache = [] {
    auto* const made = new BlockCache;
    static BlockCache* const guarded = made;
    pthread_atfork([] { guarded->lock(); }, [] { guarded->unlock(); }, [] { guarded->unlock(); });
    return made;
  }();
  return *cache;
}

}  // namespace fedpai
