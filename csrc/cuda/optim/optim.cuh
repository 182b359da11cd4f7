// SPDX-License-Identifier: Apache-2.0
// One optimiser step of all parameters of a group in one launch, each element read once and written once.
//
//   SGD     g = sign * g [+ weight_decay * p]                                       sign: -1 to maximise
//           b = momentum * b + (1 - dampening) * g                                  the first time b = g
//           p = p - lr * (b; with Nesterov g + momentum * b; without momentum g)
//   Adam    g = sign * g [+ weight_decay * p], or p = p * (1 - lr * weight_decay)   AdamW
//           m = m + (1 - beta1) * (g - m),  v = beta2 * v + (1 - beta2) * g * g     [v_max = max(v_max, v)]
//           p = p - lr / (1 - beta1^t) * m / (sqrt(v or v_max) / sqrt(1 - beta2^t) + eps)
//
// The operations and their order are those of csrc/cpu/optim/kernels-inl.h, fused multiply-adds included, so the bits are
// the CPU's, up to the last bit of Adam's two corrections, which the device's own pow computes here.
//
// Layout: a chunk is a parameter, any number of elements side by side, in the same order in all its arrays. The table of
// chunks travels as the launch's argument, so nothing is copied to the device beforehand. t is an option of the launch, or
// is read from the device where a captured step is to count on.
// Bound: memory. Bytes moved per parameter, the least there can be: SGD 12, with momentum 20; Adam 28, with amsgrad 36.
// Operations: 4 to 20. ResNet18 at 98 % (224 thousand weights) with momentum: 4.5 MB, so 1.3 us at 3.35 TB/s: the launch
// decides, and there is one.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
#pragma once

#include <cmath>

#include "cuda/common/vector.h"
#include "cuda/fedpai_cuda.h"

namespace fedpai::cuda {

constexpr int kOptimThreads = 256;
constexpr std::int64_t kOptimElements = 2048;  // of a block
constexpr int kChunksPerLaunch = 480;          // what fits into the 32764 bytes of a launch's arguments

// Chunks of one launch, and which blocks work on which: those from first_block[c] on on chunk c.
template <class Chunk, class Options>
struct ChunkTable {
  Options options;
  std::int32_t chunks;
  std::int32_t first_block[kChunksPerLaunch + 1];
  Chunk chunk[kChunksPerLaunch];
};

// The chunk that a block works on.
template <class Chunk, class Options>
FEDPAI_DEVICE std::int32_t chunk_of(const ChunkTable<Chunk, Options>& table, std::int32_t block) {
  std::int32_t low = 0, high = table.chunks;
  while (high - low > 1) {
    const std::int32_t middle = (low + high) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

FEDPAI_DEVICE void sgd_element(const FedpaiSgdChunk& c, const FedpaiSgdOptions& o, std::int64_t i) {
  const float sign = o.maximize != 0 ? -1.0f : 1.0f;
  const float x = c.p[i];
  float grad = c.g[i] * sign;
  if (o.weight_decay != 0.0) grad = fused_multiply_add(x, static_cast<float>(o.weight_decay), grad);
  if (o.momentum != 0.0) {
    const auto momentum = static_cast<float>(o.momentum);
    float b = grad;
    if (c.first == 0) b = fused_multiply_add(grad, static_cast<float>(1.0 - o.dampening), c.buffer[i] * momentum);
    c.buffer[i] = b;
    grad = o.nesterov != 0 ? fused_multiply_add(b, momentum, grad) : b;
  }
  c.p[i] = fused_multiply_add(grad, static_cast<float>(-o.lr), x);
}

// What depends on the number of steps.
struct AdamCorrections {
  float root;        // sqrt(1 - beta2^t)
  float minus_step;  // -lr / (1 - beta1^t)
};

FEDPAI_DEVICE AdamCorrections adam_corrections(const FedpaiAdamChunk& c, const FedpaiAdamOptions& o) {
  const double t = c.device_step != nullptr ? static_cast<double>(*c.device_step) : o.step;
  return {static_cast<float>(std::sqrt(1.0 - std::pow(o.beta2, t))), static_cast<float>(-(o.lr / (1.0 - std::pow(o.beta1, t))))};
}

FEDPAI_DEVICE void adam_element(const FedpaiAdamChunk& c, const FedpaiAdamOptions& o, const AdamCorrections& f, std::int64_t i) {
  const float sign = o.maximize != 0 ? -1.0f : 1.0f;
  const auto pull = static_cast<float>(1.0 - o.beta1), beta2 = static_cast<float>(o.beta2);
  float x = c.p[i];
  float grad = c.g[i] * sign;
  if (o.weight_decay != 0.0) {
    if (o.decoupled != 0) {
      x = x * static_cast<float>(1.0 - o.lr * o.weight_decay);
    } else {
      grad = fused_multiply_add(x, static_cast<float>(o.weight_decay), grad);
    }
  }
  const float before = c.m[i];
  // A large pull is counted from the gradient, as torch's lerp does.
  const float mean = pull >= 0.5f ? fused_multiply_add(pull - 1.0f, grad - before, grad)
                                  : fused_multiply_add(pull, grad - before, before);
  float square = c.v[i] * beta2;
  square = fused_multiply_add(static_cast<float>(1.0 - o.beta2) * grad, grad, square);
  c.m[i] = mean;
  c.v[i] = square;
  if (c.v_max != nullptr) {
    // In this order NaN stays NaN: v_max holds one only where v does.
    const float largest = c.v_max[i];
    square = largest > square ? largest : square;
    c.v_max[i] = square;
  }
  const float scale = std::sqrt(square) / f.root + static_cast<float>(o.eps);
  c.p[i] = x + (f.minus_step * mean) / scale;
}

// ---- launches, on the host --------------------------------------------------------------------------------------

// Fills `table` from the first chunks that there are; returns how many. Their blocks: table.first_block[table.chunks].
template <class Chunk, class Options>
std::int64_t fill_table(const Chunk* chunks, std::int64_t count, const Options& options, ChunkTable<Chunk, Options>& table) {
  const std::int64_t taken = count < kChunksPerLaunch ? count : kChunksPerLaunch;
  table.options = options;
  table.chunks = static_cast<std::int32_t>(taken);
  std::int64_t blocks = 0;
  for (std::int64_t c = 0; c < taken; ++c) {
    table.chunk[c] = chunks[c];
    table.first_block[c] = static_cast<std::int32_t>(blocks);
    blocks += (chunks[c].count + kOptimElements - 1) / kOptimElements;
  }
  table.first_block[taken] = static_cast<std::int32_t>(blocks);
  return taken;
}

}  // namespace fedpai::cuda
