// SPDX-License-Identifier: Apache-2.0
// The cache of freed blocks: what is reused, how much is kept, and what goes first.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
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
    CHECK(block.size >= bytes && block.size <= bytes + bytes / 8 + 64 * kKiB, std::to_string(block.size));
    std::memset(block.data, 1, block.size);
    cache.free(block);
  }
}

bool inside(const Block& inner, const Block& outer) {
  auto* const data = static_cast<char*>(outer.data);
  return inner.data >= data && static_cast<char*>(inner.data) + inner.size <= data + outer.size;
}

void check_reuse() {
  begin_case("the smallest free range that fits, of those freed the latest");
  BlockCache cache;
  std::vector<Block> blocks, walls;  // walls keep what is freed apart
  for (const std::size_t bytes : {1200 * kKiB, kMiB, kMiB}) {
    blocks.push_back(cache.allocate(bytes));
    walls.push_back(cache.allocate(4 * kKiB));
  }
  for (const int i : {2, 1, 0}) cache.free(blocks[i]);
  for (const int i : {1, 2, 0}) CHECK(cache.allocate(kMiB).data == blocks[i].data, text(cache.stats()));
  CHECK(cache.stats().hits == 3 && cache.stats().misses == 6, text(cache.stats()));
  for (const Block& block : blocks) cache.free({block.data, kMiB});
  for (const Block& block : walls) cache.free(block);
  CHECK(cache.stats().live_bytes == 0, text(cache.stats()));
  cache.empty();
  CHECK(cache.stats().cached_bytes == 0, text(cache.stats()));
}

void check_split_and_join() {
  begin_case("a freed block serves smaller ones, and the rest of it stays");
  BlockCache cache;
  const Block whole = cache.allocate(8 * kMiB);
  cache.free(whole);
  const std::uint64_t misses = cache.stats().misses;
  const Block large = cache.allocate(4 * kMiB), middle = cache.allocate(2 * kMiB), small = cache.allocate(300 * kKiB);
  for (const Block& part : {large, middle, small}) CHECK(inside(part, whole), "elsewhere");
  CHECK(cache.stats().misses == misses, text(cache.stats()));
  CHECK(cache.stats().live_bytes + cache.stats().cached_bytes == 8 * kMiB, text(cache.stats()));

  begin_case("freed neighbours serve a larger one, in whatever order they were freed");
  std::vector<Block> parts = {large, middle, small};
  std::sort(parts.begin(), parts.end(), [](const Block& a, const Block& b) { return a.data < b.data; });
  std::vector<int> order = {0, 1, 2};
  do {
    for (const int i : order) cache.free(parts[i]);
    const Block again = cache.allocate(8 * kMiB);
    CHECK(again.data == whole.data && cache.stats().misses == misses, text(cache.stats()));
    cache.free(again);
    for (Block& part : parts) part = cache.allocate(part.size);
  } while (std::next_permutation(order.begin(), order.end()));
  for (const Block& part : parts) cache.free(part);

  begin_case("a block that is larger than what is cached asks for the difference");
  cache.free(cache.allocate(10 * kMiB));
  CHECK(cache.stats().misses == misses + 1 && cache.stats().cached_bytes == 10 * kMiB, text(cache.stats()));

  begin_case("a block larger than a segment");
  const Block huge = cache.allocate(std::size_t{1} << 31);
  std::memset(huge.data, 1, 64);
  std::memset(static_cast<char*>(huge.data) + huge.size - 64, 1, 64);
  cache.free(huge);
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

  begin_case("what was left unused for longest goes first");
  BlockCache other;
  const Block oldest = other.allocate(6 * kMiB), wall = other.allocate(4 * kKiB), newer = other.allocate(4 * kMiB);
  const Block end = other.allocate(2 * kMiB);
  for (const Block& block : {oldest, newer}) other.free(block);
  const Block next = other.allocate(7 * kMiB);  // 19 MiB with what is cached, where 15 are allowed
  CHECK(other.stats().cached_bytes == 4 * kMiB, text(other.stats()));
  const std::uint64_t hits = other.stats().hits;
  CHECK(other.allocate(4 * kMiB).data == newer.data && other.stats().hits == hits + 1, text(other.stats()));
  for (const Block& block : {wall, end, next, newer}) other.free(block);
}

#ifdef __linux__
// Pages of a block that hold memory.
std::size_t resident(const Block& block) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(block.size / page);
  CHECK(mincore(block.data, block.size, pages.data()) == 0, "mincore");
  return static_cast<std::size_t>(std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; }));
}

void check_release() {
  begin_case("what is given back is memory, not only a number");
  BlockCache cache;
  const Block block = cache.allocate(8 * kMiB), wall = cache.allocate(300 * kKiB);
  std::memset(block.data, 1, block.size);
  std::memset(wall.data, 2, wall.size);
  cache.free(block);
  CHECK(resident(block) == block.size / static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), "lost while cached");
  cache.empty();
  CHECK(resident(block) == 0, std::to_string(resident(block)) + " pages stayed");
  CHECK(static_cast<char*>(wall.data)[wall.size - 1] == 2, "a neighbour was given back as well");
  const Block again = cache.allocate(8 * kMiB);
  CHECK(again.data == block.data && cache.stats().hits == 0, text(cache.stats()));
  for (const Block& left : {again, wall}) cache.free(left);
}
#endif

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

// Blocks of every size come and go at random; a plain list of what is live is the model.
void check_random() {
  begin_case("random blocks against a list of them");
  struct Live {
    Block block;
    std::uint64_t tag;
  };
  const auto words = [](const Live& live) {
    auto* const data = static_cast<std::uint64_t*>(live.block.data);
    const std::size_t count = live.block.size / sizeof *data;
    return std::vector<std::uint64_t*>{data, data + count / 2, data + count - 1};
  };
  Random random(7);
  BlockCache cache;
  std::vector<Live> live;
  std::size_t bytes = 0, peak = 0;
  std::uint64_t allocations = 0;
  for (int i = 0; i < 20000; ++i) {
    if (live.empty() || (live.size() < 40 && random.next() % 2 == 0)) {
      const std::size_t wanted = (std::size_t{1} << (random.next() % 24)) + random.next() % 5000;
      const Live made{cache.allocate(wanted), random.next()};
      CHECK(made.block.size >= wanted, std::to_string(wanted));
      for (std::uint64_t* const word : words(made)) *word = made.tag;
      for (const Live& other : live) {
        auto *const a = static_cast<char*>(made.block.data), *const b = static_cast<char*>(other.block.data);
        CHECK(a + made.block.size <= b || b + other.block.size <= a, "two blocks overlap");
      }
      live.push_back(made);
      bytes += made.block.size;
      peak = std::max(peak, bytes);
      ++allocations;
    } else {
      std::swap(live[random.next() % live.size()], live.back());
      for (const std::uint64_t* const word : words(live.back())) CHECK(*word == live.back().tag, "overwritten");
      bytes -= live.back().block.size;
      cache.free(live.back().block);
      live.pop_back();
    }
    if (i % 1000 == 999) cache.set_slack(1 + random.uniform());
    if (i % 3000 == 2999) cache.empty();
    const BlockCacheStats stats = cache.stats();
    CHECK(stats.live_bytes == bytes && stats.peak_live_bytes == peak, text(stats));
    CHECK(stats.hits + stats.misses == allocations, text(stats));
    CHECK(static_cast<double>(bytes + stats.cached_bytes) <= 2 * static_cast<double>(peak), text(stats));
  }
  for (const Live& left : live) cache.free(left.block);
  cache.empty();
  CHECK(cache.stats().live_bytes == 0 && cache.stats().cached_bytes == 0, text(cache.stats()));
}

void check_fork() {
  begin_case("a child of a process whose other threads allocate");
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 2; ++i) {
    threads.emplace_back([&stop, i] {
      while (!stop) block_cache().free(block_cache().allocate((1 + i) * kMiB));
    });
  }
  for (int round = 0; round < 30; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);  // instead of a test that hangs
      const Block block = block_cache().allocate(3 * kMiB);
      std::memset(block.data, 1, block.size);
      block_cache().free(block);
      _exit(0);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "status " + std::to_string(status));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

FEDPAI_SUITE(block_cache) {
  check_blocks();
  check_reuse();
  check_split_and_join();
  check_steps();
  check_limit();
#ifdef __linux__
  check_release();
#endif
  check_window();
  check_refusal();
  check_random();
  check_threads();
  check_fork();
}
