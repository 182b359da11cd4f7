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
#include <mutex>
#include <set>

namespace fedpai {

struct Block {
  void* data = nullptr;
  std::size_t size = 0;  // bytes; at least what was asked for
};

struct BlockCacheStats {
  std::size_t live_bytes = 0;       // in blocks that are in use
  std::size_t cached_bytes = 0;     // in blocks that wait for a use
  std::size_t peak_live_bytes = 0;  // the most that live_bytes has ever been
  std::uint64_t hits = 0;           // allocations served by a cached block
  std::uint64_t misses = 0;         // allocations that asked the system
};

// Every member may be called by any thread at any time.
//
// How much is kept: no allocation takes live and cached blocks together above slack times the most that was live
// recently. To find every block that it wants, a step of training needs more than its peak, because blocks of different
// sizes peak at different moments: 1.2 times as much for ResNet-34, 2.0 times for VGG-11. When the limit is reached,
// the blocks left unused for longest go back to the system. "Recently" is the current window of kWindow allocations
// (tens of training steps) and the one before it, so that a process which goes over to smaller batches gives back what
// it no longer needs.
class BlockCache {
 public:
  static constexpr double kSlack = 3.0;  // unless set_slack() says otherwise
  static constexpr std::uint64_t kWindow = 4096;

  BlockCache() = default;
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;
  ~BlockCache() { empty(); }

  // A block of at least `bytes` > 0 and at most a quarter more than that and its rounding to pages, of arbitrary
  // content. Aligned to a large page (2 MiB) where it holds one, else to a page. Throws std::bad_alloc when the system
  // has no memory even without what is cached.
  Block allocate(std::size_t bytes);

  // Takes back a block that allocate() returned.
  void free(Block block) noexcept;

  // Gives every cached block back to the system.
  void empty() noexcept;

  BlockCacheStats stats() const;

  // At least 1. Below what training needs, every step asks the system again for the rest, which costs page faults.
  void set_slack(double slack);

 private:
  struct Cached {
    Block block;
    std::uint64_t freed;  // counts frees: larger is later
  };
  // By size; among equal sizes the block freed last comes first, as it may still be in the CPU's caches.
  struct BestFit {
    bool operator()(const Cached& a, const Cached& b) const {
      return a.block.size != b.block.size ? a.block.size < b.block.size : a.freed > b.freed;
    }
  };

  void note_live(std::size_t added);
  void begin_window();
  void trim(std::size_t incoming);
  void release(std::set<Cached, BestFit>::iterator cached) noexcept;

  mutable std::mutex mutex_;
  std::set<Cached, BestFit> cached_;
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
