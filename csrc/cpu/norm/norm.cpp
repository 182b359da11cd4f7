// SPDX-License-Identifier: Apache-2.0
#include "cpu/norm/norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"

namespace fedpai {
namespace {

// Elements that one more thread must have to do before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;
// Blocks in a piece, where rows are cut because there are too few of them to keep all threads evenly busy.
constexpr std::int64_t kBlocksPerPiece = 16;
constexpr std::int64_t kRowsPerThread = 4;

struct Cut {
  int threads;
  bool whole_rows;
  std::int64_t blocks;  // per row
  std::int64_t pieces;  // per row
};

Cut cut(NormShape shape, int threads) {
  Cut c{};
  const std::int64_t useful = shape.channels * shape.row / kElementsPerThread;
  c.threads = static_cast<int>(std::clamp<std::int64_t>(useful, 1, std::max(threads, 1)));
  c.whole_rows = c.threads == 1 || shape.channels >= kRowsPerThread * c.threads;
  c.blocks = (shape.row + kNormBlock - 1) / kNormBlock;
  c.pieces = (c.blocks + kBlocksPerPiece - 1) / kBlocksPerPiece;
  return c;
}

std::int64_t block_size(std::int64_t row, std::int64_t block) {
  return std::min(kNormBlock, row - block * kNormBlock);
}

// Chan's pairwise update, in the order of the blocks.
struct MomentsFold {
  double count = 0.0, mean = 0.0, m2 = 0.0;
  void add(NormMoments block, double n) {
    const double total = count + n, delta = block.mean - mean;
    mean += delta * (n / total);
    m2 += block.m2 + delta * delta * (count * n / total);
    count = total;
  }
};

struct SumsFold {
  double g = 0.0, g_xc = 0.0;
  void add(NormSums block) {
    g += block.g;
    g_xc += block.g_xc;
  }
};

// Runs body(channel, begin, size) over all elements, one whole row or one piece of a row at a time.
template <class F>
void for_pieces(NormShape shape, const Cut& c, const F& body) {
  const std::int64_t piece = kBlocksPerPiece * kNormBlock;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (std::int64_t i = 0; i < shape.channels * c.pieces; ++i) {
    const std::int64_t begin = i % c.pieces * piece;
    body(i / c.pieces, begin, std::min(piece, shape.row - begin));
  }
}

template <class F>
void for_rows(NormShape shape, const Cut& c, const F& body) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) body(channel);
}

// Computes block(channel, first element, size) for all blocks of all rows; element [channel * blocks + block].
template <class Result, class F>
std::vector<Result> for_blocks(NormShape shape, const Cut& c, const F& block) {
  std::vector<Result> results(static_cast<std::size_t>(shape.channels * c.blocks));
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (std::int64_t i = 0; i < shape.channels * c.blocks; ++i) {
    const std::int64_t b = i % c.blocks;
    results[static_cast<std::size_t>(i)] = block(i / c.blocks, b * kNormBlock, block_size(shape.row, b));
  }
  return results;
}

template <class T>
NormAffine<T> affine(const T* weight, const T* bias, T mean, T invstd, std::int64_t channel) {
  return {mean, weight != nullptr ? weight[channel] * invstd : invstd, bias != nullptr ? bias[channel] : T(0)};
}

// y = activation(norm(x) [+ r]); r may be null.
template <class T>
void apply(const T* x, const T* r, Activation activation, T* y, std::int64_t n, NormAffine<T> p) {
  const NormKernels<T>& k = norm_kernels<T>();
  const T slope = static_cast<T>(activation.slope);
  if (r != nullptr) {
    k.apply_add[activation.kind](x, r, y, n, p, slope);
  } else {
    k.apply[activation.kind](x, y, n, p, slope);
  }
}

template <class T>
const T* offset(const T* row, std::int64_t by) {
  return row != nullptr ? row + by : nullptr;
}

// n <= kNormBlock elements from `at` on, which are widened into scratch if need be.
template <class T>
const T* kept_block(const NormKept<T>& kept, std::int64_t at, std::int64_t n, T* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (kept.rounded != nullptr) {
      kernels().bf16.widen(kept.rounded + at, scratch, n);
      return scratch;
    }
  }
  return kept.exact + at;
}

}  // namespace

template <class T>
std::vector<NormAffine<T>> norm_affines(std::int64_t channels, const T* weight, const T* bias, const T* mean,
                                        const T* invstd) {
  std::vector<NormAffine<T>> maps;
  for (std::int64_t c = 0; c < channels; ++c) maps.push_back(affine(weight, bias, mean[c], invstd[c], c));
  return maps;
}

template <class T>
void normalise(NormShape shape, const T* x, NormMap<T> map, T* y, int threads) {
  for_pieces(shape, cut(shape, threads), [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    const std::int64_t at = channel * shape.row + begin;
    apply<T>(x + at, nullptr, map.activation, y + at, n, map.channel[channel]);
  });
}

template <class T>
void batch_norm_train(NormShape shape, const T* x, const T* r, const T* weight, const T* bias, double eps,
                      Activation activation, T* y, T* mean, T* invstd, T* var, int threads) {
  const NormKernels<T>& k = norm_kernels<T>();
  const Cut c = cut(shape, threads);
  const auto block = [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    return k.moments(x + channel * shape.row + begin, n);
  };
  const auto finish = [&](std::int64_t channel, const MomentsFold& f) {
    mean[channel] = static_cast<T>(f.mean);
    invstd[channel] = static_cast<T>(1.0 / std::sqrt(f.m2 / f.count + eps));
    var[channel] = static_cast<T>(f.m2 / (f.count - 1.0));
  };
  const auto write_y = [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    const std::int64_t at = channel * shape.row + begin;
    apply(x + at, offset(r, at), activation, y + at, n, affine(weight, bias, mean[channel], invstd[channel], channel));
  };

  if (c.whole_rows) {
    for_rows(shape, c, [&](std::int64_t channel) {
      MomentsFold fold;
      for (std::int64_t b = 0; b < c.blocks; ++b) {
        const std::int64_t n = block_size(shape.row, b);
        fold.add(block(channel, b * kNormBlock, n), static_cast<double>(n));
      }
      finish(channel, fold);
      if (y != nullptr) write_y(channel, 0, shape.row);
    });
    return;
  }
  const std::vector<NormMoments> blocks = for_blocks<NormMoments>(shape, c, block);
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    MomentsFold fold;
    for (std::int64_t b = 0; b < c.blocks; ++b) {
      fold.add(blocks[static_cast<std::size_t>(channel * c.blocks + b)],
               static_cast<double>(block_size(shape.row, b)));
    }
    finish(channel, fold);
  }
  if (y != nullptr) for_pieces(shape, c, write_y);
}

template <class T>
void batch_norm_eval(NormShape shape, const T* x, const T* r, const T* weight, const T* bias, const T* mean,
                     const T* var, double eps, Activation activation, T* y, T* invstd, int threads) {
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    invstd[channel] = static_cast<T>(1.0 / std::sqrt(static_cast<double>(var[channel]) + eps));
  }
  if (y == nullptr) return;
  for_pieces(shape, cut(shape, threads), [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    const std::int64_t at = channel * shape.row + begin;
    apply(x + at, offset(r, at), activation, y + at, n, affine(weight, bias, mean[channel], invstd[channel], channel));
  });
}

template <class T>
void batch_norm_backward(NormShape shape, const T* dy, NormKept<T> x, NormKept<T> z, const T* weight, const T* bias,
                         const T* mean, const T* invstd, bool through_statistics, Activation activation, T* dx, T* dr,
                         T* dweight, T* dbias, int threads) {
  const NormKernels<T>& k = norm_kernels<T>();
  const bool smooth = activation.is_smooth();
  const bool pulled_first = !z.absent() || smooth;  // the first look writes the gradient before the activation
  const ActivationKind again = pulled_first ? kNone : activation.kind;  // computed again from x, in both looks
  const T slope = static_cast<T>(activation.slope);
  T* const kept = dr != nullptr ? dr : dx;  // where that gradient stays for the second look; null: nowhere
  const T* const g = pulled_first ? kept : dy;
  const Cut c = cut(shape, threads);
  const bool want_sums = dweight != nullptr || (dx != nullptr && through_statistics);
  std::vector<NormPull<T>> pulls(static_cast<std::size_t>(shape.channels));

  const auto params = [&](std::int64_t channel) {
    return affine(weight, bias, mean[channel], invstd[channel], channel);
  };
  // `from`: x from `at` on; read where the activation is smooth.
  const auto pull = [&](std::int64_t channel, std::int64_t at, std::int64_t n, const T* from, T* to) {
    T wide[kNormBlock];
    const T* const kept_z = z.absent() ? nullptr : kept_block(z, at, n, wide);
    if (smooth) {
      k.pull[activation.kind](dy + at, from, kept_z, to, n, params(channel));
    } else {
      k.cut[activation.kind](dy + at, kept_z, to, n, slope);
    }
  };
  const auto block = [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    const std::int64_t at = channel * shape.row + begin;
    T wide[kNormBlock];
    const T* const from = kept_block(x, at, n, wide);
    if (!pulled_first) return k.sums[again](dy + at, from, n, params(channel), slope);
    T scratch[kNormBlock];
    T* const pulled = kept != nullptr ? kept + at : scratch;
    pull(channel, at, n, from, pulled);
    return k.sums[again](pulled, from, n, params(channel), slope);
  };
  const auto finish = [&](std::int64_t channel, const SumsFold& f) {
    const double inv = static_cast<double>(invstd[channel]), count = static_cast<double>(shape.row);
    if (dweight != nullptr) {
      dweight[channel] = static_cast<T>(f.g_xc * inv);
      dbias[channel] = static_cast<T>(f.g);
    }
    pulls[static_cast<std::size_t>(channel)] = {static_cast<T>(f.g / count),
                                                static_cast<T>(f.g_xc * inv * inv / count)};
  };
  const auto write_dx = [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    T wide[kNormBlock];
    const std::int64_t step = x.rounded != nullptr ? kNormBlock : n;
    for (std::int64_t i = begin; i < begin + n; i += step) {
      const std::int64_t at = channel * shape.row + i, size = std::min(step, begin + n - i);
      const T* const from = kept_block(x, at, size, wide);
      if (through_statistics) {
        k.dx[again](g + at, from, dx + at, size, params(channel), slope, pulls[static_cast<std::size_t>(channel)]);
      } else {
        k.dx_fixed[again](g + at, from, dx + at, size, params(channel), slope);
      }
    }
  };
  // Without sums there was no first look that wrote the gradient.
  const auto pull_and_write = [&](std::int64_t channel, std::int64_t begin, std::int64_t size) {
    for (std::int64_t i = begin; i < begin + size; i += kNormBlock) {
      const std::int64_t at = channel * shape.row + i, n = std::min(kNormBlock, begin + size - i);
      if (kept != nullptr && pulled_first) {
        T wide[kNormBlock];
        pull(channel, at, n, smooth ? kept_block(x, at, n, wide) : nullptr, kept + at);
      }
      if (dx != nullptr) write_dx(channel, i, n);
    }
  };

  if (!want_sums) {
    for_pieces(shape, c, pull_and_write);
    return;
  }
  if (c.whole_rows) {
    for_rows(shape, c, [&](std::int64_t channel) {
      SumsFold fold;
      for (std::int64_t b = 0; b < c.blocks; ++b) {
        fold.add(block(channel, b * kNormBlock, block_size(shape.row, b)));
      }
      finish(channel, fold);
      if (dx != nullptr) write_dx(channel, 0, shape.row);
    });
    return;
  }
  const std::vector<NormSums> blocks = for_blocks<NormSums>(shape, c, block);
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    SumsFold fold;
    for (std::int64_t b = 0; b < c.blocks; ++b) fold.add(blocks[static_cast<std::size_t>(channel * c.blocks + b)]);
    finish(channel, fold);
  }
  if (dx != nullptr) for_pieces(shape, c, write_dx);
}

void round_for_backward(NormShape shape, const float* x, const float* weight, const float* bias, const float* mean,
                        const float* invstd, Activation activation, Bf16* y, int threads) {
  const auto round = norm_kernels<float>().round[activation.kind];
  const auto slope = static_cast<float>(activation.slope);
  for_pieces(shape, cut(shape, threads), [&](std::int64_t channel, std::int64_t begin, std::int64_t n) {
    const std::int64_t at = channel * shape.row + begin;
    const NormAffine<float> identity{0.0f, 1.0f, 0.0f};
    round(x + at, y + at, n,
          mean != nullptr ? affine(weight, bias, mean[channel], invstd[channel], channel) : identity, slope);
  });
}

#define FEDPAI_INSTANTIATE(T)                                                                                       \
  template std::vector<NormAffine<T>> norm_affines<T>(std::int64_t, const T*, const T*, const T*, const T*);        \
  template void normalise<T>(NormShape, const T*, NormMap<T>, T*, int);                                             \
  template void batch_norm_train<T>(NormShape, const T*, const T*, const T*, const T*, double, Activation, T*, T*,  \
                                    T*, T*, int);                                                                   \
  template void batch_norm_eval<T>(NormShape, const T*, const T*, const T*, const T*, const T*, const T*, double,   \
                                   Activation, T*, T*, int);                                                        \
  template void batch_norm_backward<T>(NormShape, const T*, NormKept<T>, NormKept<T>, const T*, const T*, const T*, \
                                       const T*, bool, Activation, T*, T*, T*, T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)
#undef FEDPAI_INSTANTIATE

}  // namespace fedpai
