// SPDX-License-Identifier: Apache-2.0
#include "cpu/optim/optim.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cpu/dispatch.h"

namespace fedpai {
namespace {

// Elements that one more thread must have to do before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;
// Shares begin at multiples of this, so that two threads seldom meet in a cache line.
constexpr std::int64_t kShareUnit = 64;

// Cuts the elements of all chunks, in their order, into one share of equal length for each thread and runs
// body(chunk number, first element, elements) over the pieces of each share.
template <class Chunk, class F>
void for_shares(const std::vector<Chunk>& chunks, int threads, const F& body) {
  std::int64_t total = 0;
  for (const Chunk& chunk : chunks) total += chunk.count;
  const auto parts = std::clamp<std::int64_t>(total / kElementsPerThread, 1, std::max(threads, 1));
  const std::int64_t share = (total / parts / kShareUnit + 1) * kShareUnit;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t share_begin = part * share, share_end = std::min(total, share_begin + share);
    std::int64_t chunk_begin = 0;
    for (std::size_t c = 0; c < chunks.size() && chunk_begin < share_end; ++c) {
      const std::int64_t chunk_end = chunk_begin + chunks[c].count;
      const std::int64_t begin = std::max(chunk_begin, share_begin), end = std::min(chunk_end, share_end);
      if (begin < end) body(c, begin - chunk_begin, end - begin);
      chunk_begin = chunk_end;
    }
  }
}

template <class T>
T* offset(T* array, std::int64_t by) {
  return array != nullptr ? array + by : nullptr;
}

template <class T>
AdamFactors<T> adam_factors(const AdamOptions& o, double step) {
  const double correction1 = 1.0 - std::pow(o.beta1, step), correction2 = 1.0 - std::pow(o.beta2, step);
  AdamFactors<T> f{};
  f.sign = o.maximize ? T(-1) : T(1);
  f.decay = o.weight_decay == 0.0 ? AdamDecay::kNone : o.decoupled ? AdamDecay::kParameter : AdamDecay::kGradient;
  f.weight_decay = static_cast<T>(o.weight_decay);
  f.keep = static_cast<T>(1.0 - o.lr * o.weight_decay);
  f.pull = static_cast<T>(1.0 - o.beta1);
  f.pull_is_large = f.pull >= T(0.5);
  f.beta2 = static_cast<T>(o.beta2);
  f.one_minus_beta2 = static_cast<T>(1.0 - o.beta2);
  f.correction = static_cast<T>(std::sqrt(correction2));
  f.eps = static_cast<T>(o.eps);
  f.minus_step = static_cast<T>(-(o.lr / correction1));
  return f;
}

}  // namespace

template <class T>
void sgd_step(const std::vector<SgdChunk<T>>& chunks, const SgdOptions& o, int threads) {
  SgdFactors<T> factors{};
  factors.sign = o.maximize ? T(-1) : T(1);
  factors.weight_decay = static_cast<T>(o.weight_decay);
  factors.momentum = static_cast<T>(o.momentum);
  factors.undamped = static_cast<T>(1.0 - o.dampening);
  factors.minus_lr = static_cast<T>(-o.lr);
  factors.decays = o.weight_decay != 0.0;
  factors.has_momentum = o.momentum != 0.0;
  factors.nesterov = o.nesterov;
  const auto step = optim_kernels<T>().sgd;
  for_shares(chunks, threads, [&](std::size_t number, std::int64_t begin, std::int64_t n) {
    const SgdChunk<T>& chunk = chunks[number];
    SgdFactors<T> own = factors;
    own.first = chunk.first;
    step(chunk.p + begin, chunk.g + begin, offset(chunk.buffer, begin), n, own);
  });
}

template <class T>
void adam_step(const std::vector<AdamChunk<T>>& chunks, const AdamOptions& o, int threads) {
  std::vector<AdamFactors<T>> factors;
  factors.reserve(chunks.size());
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const bool as_before = c > 0 && chunks[c].step == chunks[c - 1].step;  // so it is, nearly always
    factors.push_back(as_before ? factors.back() : adam_factors<T>(o, chunks[c].step));
  }
  const auto step = optim_kernels<T>().adam;
  for_shares(chunks, threads, [&](std::size_t number, std::int64_t begin, std::int64_t n) {
    const AdamChunk<T>& chunk = chunks[number];
    step(chunk.p + begin, chunk.g + begin, chunk.m + begin, chunk.v + begin, offset(chunk.v_max, begin), n,
         factors[number]);
  });
}

bool disjoint(std::vector<Extent> written, const std::vector<Extent>& read) {
  const auto is_empty = [](const Extent& e) { return e.begin == e.end; };
  written.erase(std::remove_if(written.begin(), written.end(), is_empty), written.end());
  std::sort(written.begin(), written.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < written.size(); ++i) {
    if (written[i].begin < written[i - 1].end) return false;
  }
  for (const Extent& r : read) {
    if (is_empty(r)) continue;
    // Those that are written do not overlap, so they are in order of their ends too.
    const auto after = std::upper_bound(written.begin(), written.end(), r.begin,
                                        [](std::uintptr_t address, const Extent& w) { return address < w.end; });
    if (after != written.end() && after->begin < r.end) return false;
  }
  return true;
}

template void sgd_step<float>(const std::vector<SgdChunk<float>>&, const SgdOptions&, int);
template void sgd_step<double>(const std::vector<SgdChunk<double>>&, const SgdOptions&, int);
template void adam_step<float>(const std::vector<AdamChunk<float>>&, const AdamOptions&, int);
template void adam_step<double>(const std::vector<AdamChunk<double>>&, const AdamOptions&, int);

}  // namespace fedpai
