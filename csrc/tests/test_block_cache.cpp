// SPDX-License-Identifier: Apache-2.0
// The cache of freed blocks: what is reused, how much is kept, and which blocks go first.
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "check.h"
#include "memory/block_cache.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;

std::string text(const BlockCacheStats& stats) {
  return "live " + std::to_string(stats.live_bytes) + ", cached " + std::to_string(stats.cached_bytes) + ", hits " +
         std::to_string(stats.hits) + ", misses " + std::to_string(stats.misses);
}

bool refuses(BlockCache& cache, std::size_t bytes) {
  try {
    cache.free(cache.allocate(bytes));
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

void check_blocks() {
  BlockCache cache;
  for (const std::size_t bytes : {std::size_t{1}, 300 * kKiB, 2 * kMiB - 1, 2 * kMiB, 2 * kMiB + 1, 17 * kMiB - 5}) {
    begin_case("a block of " + std::to_string(bytes));
    const Block block = cache.allocate(bytes);
    const std::size_t alignment = block.size >= 2 * kMiB ? 2 * kMiB : 4 * kKiB;
    CHECK(reinterpret_cast<std::uintptr_t>(block.data) % alignment == 0, std::to_string(alignment));
    CHECK(block.size >= bytes && block.size <= bytes + bytes / 4 + 64 * kKiB, std::to_string(block.size));
    std::memset(block.data, 1, block.size);
    cache.free(block);
  }
}

void check_reuse() {
  begin_case("the smallest block that fits, of those freed the latest");
  BlockCache cache;
  const Block large = cache.allocate(1200 * kKiB), first = cache.allocate(kMiB), second = cache.allocate(kMiB);
  for (const Block& block : {second, first, large}) cache.free(block);
  CHECK(cache.allocate(kMiB).data == first.data, text(cache.stats()));
  CHECK(cache.allocate(kMiB).data == second.data, text(cache.stats()));
  CHECK(cache.allocate(kMiB).data == large.data, text(cache.stats()));
  CHECK(cache.stats().hits == 3 && cache.stats().misses == 3, text(cache.stats()));

  begin_case("no block that is more than a quarter too large");
  cache.free(first);
  const Block small = cache.allocate(700 * kKiB);
  CHECK(small.data != first.data, text(cache.stats()));
  cache.free(small);
  for (const Block& block : {second, large}) cache.free(block);
  CHECK(cache.stats().live_bytes == 0, text(cache.stats()));
  cache.empty();
  CHECK(cache.stats().cached_bytes == 0, text(cache.stats()));
}

// Forward: every activation stays. Backward: each is read once more, and gradients come and go.
void step(BlockCache& cache, const std::vector<std::size_t>& sizes) {
  std::vector<Block> activations;
  for (const std::size_t bytes : sizes) activations.push_back(cache.allocate(bytes));
  Block gradient = cache.allocate(sizes.back());
  for (std::size_t i = sizes.size(); i-- > 0;) {
    const Block next = cache.allocate(sizes[i]);
    cache.free(gradient);
    cache.free(activations[i]);
    gradient = next;
  }
  cache.free(gradient);
}

void check_steps() {
  begin_case("a step like the one before asks the system for nothing");
  BlockCache cache;
  const std::vector<std::size_t> sizes = {8 * kMiB, 8 * kMiB, 4 * kMiB, 4 * kMiB, 2 * kMiB, 2 * kMiB, kMiB, 300 * kKiB};
  for (int i = 0; i < 2; ++i) step(cache, sizes);
  const std::uint64_t misses = cache.stats().misses;
  for (int i = 0; i < 3; ++i) step(cache, sizes);
  CHECK(cache.stats().misses == misses, text(cache.stats()));
  CHECK(cache.stats().live_bytes == 0, text(cache.stats()));
}

void check_limit() {
  begin_case("sizes that never come again: held is a multiple of the peak");
  BlockCache cache;
  std::size_t total = 0;
  for (std::size_t bytes = kMiB; bytes < 64 * kMiB; bytes += bytes / 3) {
    cache.free(cache.allocate(bytes));
    const BlockCacheStats stats = cache.stats();
    CHECK(static_cast<double>(stats.cached_bytes) <= BlockCache::kSlack * static_cast<double>(stats.peak_live_bytes),
          text(stats));
    total += bytes;
  }
  CHECK(cache.stats().cached_bytes < total, "nothing was given up");

  begin_case("without slack, what is held stays within the peak");
  BlockCache tight;
  tight.set_slack(1.0);
  const Block large = tight.allocate(8 * kMiB);
  tight.free(tight.allocate(4 * kMiB));
  tight.free(large);
  tight.free(tight.allocate(3 * kMiB));
  CHECK(tight.stats().cached_bytes <= tight.stats().peak_live_bytes, text(tight.stats()));

  begin_case("the block unused for longest goes first");
  cache.empty();
  BlockCache other;
  const Block oldest = other.allocate(6 * kMiB), newer = other.allocate(4 * kMiB);
  for (const Block& block : {oldest, newer}) other.free(block);
  for (const std::size_t bytes : {8 * kMiB, 12 * kMiB}) other.free(other.allocate(bytes));
  CHECK(other.stats().cached_bytes == (6 + 4 + 8 + 12) * kMiB, text(other.stats()));
  other.free(other.allocate(14 * kMiB));  // with what is cached 44 MiB, where 3 x 14 are allowed
  CHECK(other.stats().cached_bytes == (4 + 8 + 12 + 14) * kMiB, text(other.stats()));
  CHECK(other.allocate(4 * kMiB).data == newer.data, text(other.stats()));
  other.free(newer);
}

void check_window() {
  begin_case("what was large long ago is given back");
  BlockCache cache;
  cache.free(cache.allocate(64 * kMiB));
  for (std::uint64_t i = 0; i < 2 * BlockCache::kWindow; ++i) cache.free(cache.allocate(kMiB));
  CHECK(cache.stats().cached_bytes == kMiB, text(cache.stats()));
  CHECK(cache.stats().peak_live_bytes == 64 * kMiB, text(cache.stats()));
}

void check_refusal() {
  begin_case("no memory: the cache is given up, then bad_alloc, and nothing else changes");
  BlockCache cache;
  const Block kept = cache.allocate(kMiB);
  cache.free(cache.allocate(kMiB));
  CHECK(refuses(cache, std::size_t{1} << 60), text(cache.stats()));
  CHECK(cache.stats().cached_bytes == 0 && cache.stats().live_bytes == kMiB, text(cache.stats()));
  CHECK(cache.stats().peak_live_bytes == 2 * kMiB, text(cache.stats()));
  CHECK(refuses(cache, std::numeric_limits<std::size_t>::max()), text(cache.stats()));
  cache.free(kept);
}

void check_threads() {
  begin_case("blocks freed by other threads than those that allocated them");
  constexpr std::int64_t kBlocks = 64;
  BlockCache cache;
  std::vector<Block> blocks(kBlocks);
  for (int round = 0; round < 20; ++round) {
#pragma omp parallel for num_threads(4) schedule(dynamic)
    for (std::int64_t i = 0; i < kBlocks; ++i) {
      blocks[i] = cache.allocate((1 + i % 7) * 64 * kKiB);
      *static_cast<std::int64_t*>(blocks[i].data) = i;
    }
    for (std::int64_t i = 0; i < kBlocks; ++i) {
      CHECK(*static_cast<std::int64_t*>(blocks[i].data) == i, "block " + std::to_string(i) + " was given out twice");
    }
#pragma omp parallel for num_threads(4) schedule(dynamic)
    for (std::int64_t i = kBlocks; i > 0; --i) cache.free(blocks[i - 1]);
  }
  CHECK(cache.stats().live_bytes == 0, text(cache.stats()));
  CHECK(cache.stats().hits + cache.stats().misses == 20 * kBlocks, text(cache.stats()));
}

}  // namespace

FEDPAI_SUITE(block_cache) {
  check_blocks();
  check_reuse();
  check_steps();
  check_limit();
  check_window();
  check_refusal();
  check_threads();
}
