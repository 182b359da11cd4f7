// SPDX-License-Identifier: Apache-2.0
#include "cpu/machine/machine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "memory/block_cache.h"

namespace fedpai {
namespace {

using Clock = std::chrono::steady_clock;

// A window is short against a time slice of the scheduler; a piece of work is short against a window, since it counts for
// the one in which it ends.
constexpr double kWindowSeconds = 2e-3;
constexpr int kLeastWindows = 3;
constexpr std::int64_t kPieceVectors = 1 << 15;  // some 10 microseconds of multiply-adds
constexpr std::int64_t kPieceElements = 1 << 14;

void check(std::int64_t bytes, int threads, double seconds) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  if (bytes < 0) throw std::invalid_argument("bytes: expected at least 0, got " + std::to_string(bytes));
  if (!(seconds > 0)) throw std::invalid_argument("seconds: expected more than 0, got " + std::to_string(seconds));
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Memory of one thread; in large pages, as tensors and working memory of the kernels are.
class ThreadBuffer {
 public:
  explicit ThreadBuffer(std::int64_t elements)
      : block_(block_cache().allocate(std::max<std::size_t>(static_cast<std::size_t>(elements) * sizeof(float), 1))) {}
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  ThreadBuffer(ThreadBuffer&& other) noexcept : block_(std::exchange(other.block_, Block{})) {}
  ThreadBuffer& operator=(ThreadBuffer&&) = delete;
  ~ThreadBuffer() {
    if (block_.data != nullptr) block_cache().free(block_);
  }
  float* data() const { return static_cast<float*>(block_.data); }

 private:
  Block block_;
};

std::vector<ThreadBuffer> buffers(int threads, std::int64_t elements) {
  std::vector<ThreadBuffer> found;
  found.reserve(static_cast<std::size_t>(threads));
  for (int t = 0; t < threads; ++t) found.emplace_back(elements);
  return found;
}

// What a thread has done; on a cache line of its own.
struct alignas(64) Progress {
  std::atomic<std::int64_t> pieces{0};
  double best = 0;  // pieces per second in its best window
};

// What the threads contend for. Nothing: the rate is the sum of each one's best window, since one that the system has put
// aside says nothing about the machine. Memory: the best window of all together, since one that runs alone gets more of it.
enum class Shared { nothing, memory };

// Pieces per second of body(thread, piece), piece = 0, 1, ..., by all threads together. There are no barriers: a thread that
// was put aside would make all of them wait.
template <class F>
double best_rate(int threads, double seconds, Shared shared, const F& body) {
  std::vector<Progress> progress(static_cast<std::size_t>(threads));
  std::atomic<bool> done{false};
  const auto pieces_of_all = [&progress] {
    std::int64_t sum = 0;
    for (const Progress& p : progress) sum += p.pieces.load(std::memory_order_relaxed);
    return sum;
  };
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    Progress& mine = progress[static_cast<std::size_t>(thread)];
    const auto begin = Clock::now();
    auto since = begin;
    std::int64_t before = 0;
    int windows = -1;  // the first brings data and code in
    for (std::int64_t piece = 0; windows < kLeastWindows || !done.load(std::memory_order_relaxed); ++piece) {
      body(thread, piece);
      mine.pieces.store(piece + 1, std::memory_order_relaxed);
      const auto now = Clock::now();
      const double passed = std::chrono::duration<double>(now - since).count();
      if (passed < kWindowSeconds) continue;
      const std::int64_t pieces = shared == Shared::memory ? pieces_of_all() : piece + 1;
      if (windows >= 0) mine.best = std::max(mine.best, static_cast<double>(pieces - before) / passed);
      ++windows;
      before = pieces;
      since = now;
      if (thread == 0 && std::chrono::duration<double>(now - begin).count() >= seconds) done = true;
    }
  }
  if (shared == Shared::memory) return progress[0].best;
  double sum = 0;
  for (const Progress& p : progress) sum += p.best;
  return sum;
}

// Keeps a result, and with it the loop that made it.
void use(float value) {
  const volatile float sink = value;
  static_cast<void>(sink);
}

}  // namespace

double fma_rate(std::int64_t bytes, int threads, double seconds) {
  check(bytes, threads, seconds);
  const MachineKernels<float>& k = kernels().machine_f32;
  const std::int64_t tile = static_cast<std::int64_t>(k.lanes) * k.accumulators;
  if (bytes == 0) {
    const std::int64_t rounds = kPieceVectors / k.accumulators;
    const double rate = best_rate(threads, seconds, Shared::nothing, [&](int, std::int64_t) { use(k.fma_registers(rounds)); });
    return static_cast<double>(rounds * tile) * rate;
  }
  const std::int64_t elements = round_up(std::max<std::int64_t>(1, bytes / static_cast<std::int64_t>(sizeof(float))), tile);
  const auto source = buffers(threads, elements);
  for (const auto& buffer : source) std::fill_n(buffer.data(), elements, 1.0F);
  // A piece is several passes over a small buffer, or a part of a large one.
  const std::int64_t part = std::min(elements, round_up(kPieceVectors * k.lanes, tile)), parts = elements / part;
  const std::int64_t rounds = std::max<std::int64_t>(1, kPieceVectors * k.lanes / part);
  const double rate = best_rate(threads, seconds, Shared::nothing, [&](int thread, std::int64_t piece) {
    const float* const data = source[static_cast<std::size_t>(thread)].data();
    use(k.fma_loads(data + piece % parts * part, part / k.lanes, rounds));
  });
  return static_cast<double>(rounds * part) * rate;
}

double stream_rate(std::int64_t bytes, int threads, double seconds) {
  check(bytes, threads, seconds);
  const MachineKernels<float>& k = kernels().machine_f32;
  const auto size = static_cast<std::int64_t>(sizeof(float));
  const std::int64_t elements = round_up(std::max<std::int64_t>(1, bytes / size / threads / 2), 4 * k.lanes);
  const auto source = buffers(threads, elements), dest = buffers(threads, elements);
  for (const auto& buffer : source) std::fill_n(buffer.data(), elements, 1.0F);
  for (const auto& buffer : dest) std::fill_n(buffer.data(), elements, 0.0F);
  const std::int64_t part = std::min(elements, round_up(kPieceElements, 4 * k.lanes)), parts = elements / part;
  const double rate = best_rate(threads, seconds, Shared::memory, [&](int thread, std::int64_t piece) {
    const auto t = static_cast<std::size_t>(thread);
    const std::int64_t at = piece % parts * part;
    k.scale(source[t].data() + at, dest[t].data() + at, part, 2.0F);
  });
  return 3.0 * static_cast<double>(part * size) * rate;
}

LoadsPerFma loads_per_fma() {
  const MachineKernels<float>& k = kernels().machine_f32;
  return {(k.accumulators + 2.0) / k.accumulators, (k.pinned + 1.0) / k.pinned};
}

}  // namespace fedpai
