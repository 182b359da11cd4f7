// SPDX-License-Identifier: Apache-2.0
// Keeps the memory of freed tensors for the tensors that come next; plans and the kernels' working memory come from it
// too. (Not to be confused with csrc/cpu/pool, which are pooling layers.)
//
// malloc gives blocks of several MB back to the system when they are freed. A training step that allocates the same
// tensors as the step before then pays for every page again: the system finds it, clears it and maps it, which can
// take longer than the arithmetic on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace fedpai {

struct Block {
  void* data = nullptr;
  std::size_t size = 0;  // bytes; at least what was asked for
};

struct BlockCacheStats {
  std::size_t live_bytes = 0;       // in blocks that are in use
  std::size_t cached_bytes = 0;     // freed, and not given back to the system
  std::size_t peak_live_bytes = 0;  // the most that live_bytes has ever been
  std::uint64_t hits = 0;           // allocations served by cached memory alone
  std::uint64_t misses = 0;         // allocations that asked the system
};

// Every member may be called by any thread at any time.
//
// Blocks are cut out of long segments of address space, and what is freed joins its free neighbours, so that the memory
// of one size serves every other: steps of ResNet-18 and VGG-19 hold at most 5 % more than their peak (dead_ends.md
// has what blocks that are kept whole cost). Address space that nobody has written to, or that was given back, costs
// nothing; it is asked for only where cached memory does not suffice.
//
// How much is kept: no allocation takes live and cached memory together above slack times the most that was live
// recently. When the limit is reached, what was left unused for longest goes back to the system. "Recently" is the
// current window of kWindow allocations (tens of training steps) and the one before it, so that a process which goes
// over to smaller batches gives back what it no longer needs.
class BlockCache {
 public:
  static constexpr double kSlack = 1.25;  // unless set_slack() says otherwise
  static constexpr std::uint64_t kWindow = 4096;

  BlockCache() = default;
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;
  ~BlockCache();

  // A block of at least `bytes` > 0 and at most an eighth more than that and its rounding to pages, of arbitrary
  // content. Aligned to a large page (2 MiB) where it holds one, else to a page. Throws std::bad_alloc when the system
  // has no memory even without what is cached.
  Block allocate(std::size_t bytes);

  // Takes back a block that allocate() returned.
  void free(Block block) noexcept;

  // Gives all cached memory back to the system.
  void empty() noexcept;

  BlockCacheStats stats() const;

  // At least 1. Below what training needs, every step asks the system again for the rest, which costs page faults.
  void set_slack(double slack);

  // Around fork(): a child must not inherit a state that another thread was changing, nor its lock.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Range {
    std::size_t size;
    std::uint64_t freed;  // counts frees: larger is later; of use in cached_ alone
  };
  using Ranges = std::map<char*, Range>;  // by first byte, disjoint

  // Where a block might lie. The best place needs the least new memory; among equals it leaves the least of its free
  // range over; among equals again it was freed last, as it may still be in the CPU's caches.
  struct Place {
    char* data;
    std::size_t fresh;  // bytes for which the system has to be asked
    std::size_t left;
    std::uint64_t freed;
  };

  static void split(Ranges& ranges, char* at);
  Place best_place(std::size_t size) const;
  Place place_at(char* data, std::size_t size, std::size_t left) const;
  bool add_segment(std::size_t size);
  void take(char* data, std::size_t size);
  void join(Ranges::iterator range) noexcept;
  void begin_window() noexcept;
  void trim() noexcept;
  void release_all() noexcept;
  void release(Ranges::iterator cached) noexcept;
  void unmap_unused() noexcept;

  mutable std::mutex mutex_;
  Ranges segments_;  // what is mapped
  Ranges free_;      // parts of segments that are in no block; neighbours of one segment are joined
  Ranges cached_;    // parts of free_ that hold memory
  BlockCacheStats stats_;
  double slack_ = kSlack;
  std::size_t window_peak_ = 0;  // of live_bytes, in the current window and the one before
  std::size_t former_peak_ = 0;
  std::uint64_t allocations_ = 0;
  std::uint64_t frees_ = 0;
};

// The cache of the process. It is never destroyed: Python frees the last tensors after static objects are gone.
BlockCache& block_cache();

}  // namespace fedpai
