// SPDX-License-Identifier: Apache-2.0
#include "memory/block_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <new>

namespace fedpai {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  if (bytes > std::numeric_limits<std::size_t>::max() - kLargePage - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

// Whole large pages where that wastes little; else the end of the block is left to small pages.
std::size_t size_of_block(std::size_t bytes) {
  const std::size_t large = round_up(bytes, kLargePage);
  return large - bytes <= bytes / 8 ? large : round_up(bytes, page_size());
}

// Null when there is no memory.
void* map(std::size_t size) noexcept {
  const std::size_t alignment = size >= kLargePage ? kLargePage : page_size();
  const std::size_t surplus = alignment - page_size();
  void* const mapped =
      mmap(nullptr, size + surplus, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, /*offset=*/0);
  if (mapped == MAP_FAILED) return nullptr;

  auto* const begin = static_cast<char*>(mapped);
  const std::size_t before = (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  if (before > 0) munmap(begin, before);
  if (surplus > before) munmap(begin + before + size, surplus - before);
  char* const data = begin + before;
#ifdef MADV_HUGEPAGE
  // Only worth it for memory that is kept: the first touch of a large page costs more, every later one less. A system
  // that refuses leaves small pages.
  if (size >= kLargePage) madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

Block BlockCache::allocate(std::size_t bytes) {
  std::size_t size = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (++allocations_ % kWindow == 0) begin_window();
    const auto found =
        cached_.lower_bound(Cached{Block{nullptr, bytes}, std::numeric_limits<std::uint64_t>::max()});
    if (found != cached_.end() && found->block.size - bytes <= bytes / 4) {
      const Block block = found->block;
      cached_.erase(found);
      stats_.cached_bytes -= block.size;
      ++stats_.hits;
      note_live(block.size);
      return block;
    }
    size = size_of_block(bytes);
    ++stats_.misses;
    trim(size);
  }
  void* data = map(size);
  if (data == nullptr) {
    empty();
    data = map(size);
    if (data == nullptr) throw std::bad_alloc();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  note_live(size);
  return Block{data, size};
}

void BlockCache::free(Block block) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.live_bytes -= block.size;
  try {
    cached_.insert(Cached{block, ++frees_});
    stats_.cached_bytes += block.size;
  } catch (const std::bad_alloc&) {
    munmap(block.data, block.size);
  }
}

void BlockCache::empty() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!cached_.empty()) release(cached_.begin());
}

BlockCacheStats BlockCache::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void BlockCache::note_live(std::size_t added) {
  stats_.live_bytes += added;
  window_peak_ = std::max(window_peak_, stats_.live_bytes);
  stats_.peak_live_bytes = std::max(stats_.peak_live_bytes, stats_.live_bytes);
}

void BlockCache::begin_window() {
  former_peak_ = window_peak_;
  window_peak_ = stats_.live_bytes;
  trim(0);
}

// Makes room for `incoming` bytes under the limit.
void BlockCache::trim(std::size_t incoming) {
  const std::size_t live = stats_.live_bytes + incoming;
  const auto limit =
      static_cast<std::size_t>(slack_ * static_cast<double>(std::max({former_peak_, window_peak_, live})));
  while (!cached_.empty() && live + stats_.cached_bytes > limit) {
    release(std::min_element(cached_.begin(), cached_.end(),
                             [](const Cached& a, const Cached& b) { return a.freed < b.freed; }));
  }
}

void BlockCache::release(std::set<Cached, BestFit>::iterator cached) noexcept {
  munmap(cached->block.data, cached->block.size);
  stats_.cached_bytes -= cached->block.size;
  cached_.erase(cached);
}

void BlockCache::set_slack(double slack) {
  const std::lock_guard<std::mutex> lock(mutex_);
  slack_ = slack;
}

BlockCache& block_cache() {
  static BlockCache* const cache = new BlockCache;
  return *cache;
}

}  // namespace fedpai
