// SPDX-License-Identifier: Apache-2.0
// Optimiser steps as a GPU's threads do them, run on the CPU block by block, against the CPU's kernels: the same bits
// where those fuse multiply-adds, as all instruction sets but the scalar one do.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/optim/optim.h"
#include "cuda/optim/optim.cuh"

using namespace fedpai;
using namespace fedpai::tests;
using namespace fedpai::cuda;

namespace {

// One parameter with its gradient and state.
struct Arrays {
  explicit Arrays(std::int64_t n) : p(n), g(n), a(n), b(n), c(n) {
    Random random(static_cast<std::uint64_t>(n + 1));
    for (Buffer<float>* buffer : {&p, &g, &a, &b, &c}) {
      for (float& value : *buffer) {
        value = static_cast<float>(2 * random.uniform() - 1);
        if (buffer == &b || buffer == &c) value = value < 0 ? -value : value;  // mean squares
      }
    }
  }
  Buffer<float> p, g, a, b, c;
};

std::vector<Arrays> arrays_of(const std::vector<std::int64_t>& counts) {
  std::vector<Arrays> arrays;
  for (const std::int64_t n : counts) arrays.emplace_back(n);
  return arrays;
}

bool same(float got, float expected) {
  if (kernels().isa != std::string("scalar")) return std::memcmp(&got, &expected, sizeof got) == 0;
  return std::abs(got - expected) <= 16 * std::numeric_limits<float>::epsilon() * (1 + std::abs(expected));
}

void expect_same(const char* what, const std::vector<Arrays>& got, const std::vector<Arrays>& expected, Buffer<float> Arrays::*member) {
  for (std::size_t c = 0; c < expected.size(); ++c) {
    const Buffer<float>& own = got[c].*member;
    std::int64_t wrong = -1;
    for (std::int64_t i = 0; i < own.size() && wrong < 0; ++i) {
      if (!same(own[i], (expected[c].*member)[i])) wrong = i;
    }
    CHECK(wrong < 0, std::string(what) + "[" + std::to_string(wrong) + "] of chunk " + std::to_string(c));
  }
}

// Launches as the launcher makes them; body(table, chunk, element).
template <class Chunk, class Options, class F>
void launch(const std::vector<Chunk>& chunks, const Options& options, const F& body) {
  using Table = ChunkTable<Chunk, Options>;
  std::vector<Table> table(1);
  for (std::size_t done = 0; done < chunks.size();) {
    const std::int64_t taken = fill_table(chunks.data() + done, static_cast<std::int64_t>(chunks.size() - done), options, table[0]);
    for (std::int32_t block = 0; block < table[0].first_block[taken]; ++block) {
      const std::int32_t chunk = chunk_of(table[0], block);
      const std::int64_t begin = std::int64_t{block - table[0].first_block[chunk]} * kOptimElements;
      for (std::int64_t i = begin; i < begin + kOptimElements && i < table[0].chunk[chunk].count; ++i) body(table[0], chunk, i);
    }
    done += static_cast<std::size_t>(taken);
  }
}

void check_sgd(const std::vector<std::int64_t>& counts, const SgdOptions& o, bool first) {
  std::vector<Arrays> got = arrays_of(counts), expected = arrays_of(counts);
  std::vector<SgdChunk<float>> on_cpu;
  std::vector<FedpaiSgdChunk> on_gpu;
  for (std::size_t c = 0; c < counts.size(); ++c) {
    Arrays& e = expected[c];
    Arrays& g = got[c];
    on_cpu.push_back({e.p.data(), e.g.data(), o.momentum != 0 ? e.a.data() : nullptr, counts[c], first});
    on_gpu.push_back({g.p.data(), g.g.data(), o.momentum != 0 ? g.a.data() : nullptr, counts[c], first ? 1 : 0});
  }
  sgd_step(on_cpu, o, 1);
  const FedpaiSgdOptions options{o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov ? 1 : 0, o.maximize ? 1 : 0};
  launch(on_gpu, options, [](const auto& table, std::int32_t chunk, std::int64_t i) { sgd_element(table.chunk[chunk], table.options, i); });
  expect_same("p", got, expected, &Arrays::p);
  expect_same("buffer", got, expected, &Arrays::a);
}

void check_adam(const std::vector<std::int64_t>& counts, const AdamOptions& o, bool amsgrad, bool device_step) {
  const float step = 3;
  std::vector<Arrays> got = arrays_of(counts), expected = arrays_of(counts);
  std::vector<AdamChunk<float>> on_cpu;
  std::vector<FedpaiAdamChunk> on_gpu;
  for (std::size_t c = 0; c < counts.size(); ++c) {
    Arrays& e = expected[c];
    Arrays& g = got[c];
    on_cpu.push_back({e.p.data(), e.g.data(), e.a.data(), e.b.data(), amsgrad ? e.c.data() : nullptr, counts[c], static_cast<double>(step)});
    on_gpu.push_back({g.p.data(), g.g.data(), g.a.data(), g.b.data(), amsgrad ? g.c.data() : nullptr, device_step ? &step : nullptr, counts[c]});
  }
  adam_step(on_cpu, o, 1);
  const FedpaiAdamOptions options{o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, device_step ? 77.0 : static_cast<double>(step),
                                  o.decoupled ? 1 : 0, o.maximize ? 1 : 0};
  launch(on_gpu, options, [](const auto& table, std::int32_t chunk, std::int64_t i) {
    adam_element(table.chunk[chunk], table.options, adam_corrections(table.chunk[chunk], table.options), i);
  });
  expect_same("p", got, expected, &Arrays::p);
  expect_same("m", got, expected, &Arrays::a);
  expect_same("v", got, expected, &Arrays::b);
  expect_same("v_max", got, expected, &Arrays::c);
}

void check_all(const std::string& name, const std::vector<std::int64_t>& counts) {
  for (int choice = 0; choice < 32; ++choice) {
    begin_case("sgd " + name + " choice " + std::to_string(choice));
    const bool nesterov = choice & 2;
    const SgdOptions options{0.1, choice & 16 ? 0.9 : 0, nesterov ? 0 : 0.2, choice & 1 ? 0.01 : 0, nesterov, (choice & 4) != 0};
    check_sgd(counts, options, (choice & 8) != 0);
  }
  for (int choice = 0; choice < 64; ++choice) {
    begin_case("adam " + name + " choice " + std::to_string(choice));
    const double beta1 = choice & 16 ? 0.3 : 0.9;  // a large pull, and a small one
    const AdamOptions options{0.1, beta1, 0.99, 1e-3, choice & 1 ? 0.1 : 0, (choice & 2) != 0, (choice & 4) != 0};
    check_adam(counts, options, (choice & 8) != 0, (choice & 32) != 0);
  }
}

}  // namespace

FEDPAI_SUITE(cuda_host_optim) {
  check_all("no chunks", {});
  check_all("several", {5, 0, 1, 2047, 2048, 2049, 0, 0, 3});
  begin_case("more chunks than a launch takes");
  check_sgd(std::vector<std::int64_t>(2 * kChunksPerLaunch + 1, 3), {0.1, 0.9, 0, 0, false, false}, false);
}
