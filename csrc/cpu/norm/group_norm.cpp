// SPDX-License-Identifier: Apache-2.0
#include "cpu/norm/group_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"

namespace fedpai {
namespace {

// Elements that one more thread must have to do before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;
// Rows in a piece, about: what one thread takes where there are too few units to keep all threads evenly busy.
constexpr std::int64_t kRowsPerPiece = 512;
constexpr std::int64_t kUnitsPerThread = 4;

// How the work is cut. A unit is one strip of images of one group; its rows are cut into pieces, each of which is
// either some whole channels or a part of one. Nothing of this but `threads` and `whole_units` depends on the threads.
struct Cut {
  int threads;
  bool whole_units;
  std::int64_t strips;              // per group
  std::int64_t width;               // images in a strip, but for the last
  std::int64_t channels_per_group;
  std::int64_t parts;               // pieces per channel, where one channel has several
  std::int64_t channels_per_piece;  // 1 there
  std::int64_t pieces;              // per unit
  std::int64_t units;
};

Cut cut(const GroupNormShape& shape, int lanes, int threads) {
  Cut c{};
  const std::int64_t useful = shape.channels * shape.pixels * shape.images / kElementsPerThread;
  c.threads = static_cast<int>(std::clamp<std::int64_t>(useful, 1, std::max(threads, 1)));
  const std::int64_t vectors = (shape.images + lanes - 1) / lanes;
  const std::int64_t widest = group_norm_vectors(lanes);
  c.strips = (vectors + widest - 1) / widest;
  c.width = (vectors + c.strips - 1) / c.strips * lanes;
  c.strips = (shape.images + c.width - 1) / c.width;
  c.channels_per_group = shape.channels / shape.groups;
  c.parts = (shape.pixels + kRowsPerPiece - 1) / kRowsPerPiece;
  c.channels_per_piece = c.parts > 1 ? 1 : std::min(kRowsPerPiece / shape.pixels, c.channels_per_group);
  c.pieces = c.parts * ((c.channels_per_group + c.channels_per_piece - 1) / c.channels_per_piece);
  c.units = shape.groups * c.strips;
  c.whole_units = c.threads == 1 || c.pieces == 1 || c.units >= kUnitsPerThread * c.threads;
  return c;
}

// One piece of one unit: the rows [begin, begin + rows) of each of the channels [first, first + channels).
struct Piece {
  std::int64_t group, strip, part;
  std::int64_t first, channels, begin, rows;
  std::int64_t image;  // the strip's first one
  int width;
};

Piece piece(const GroupNormShape& shape, const Cut& c, std::int64_t unit, std::int64_t index) {
  Piece p{};
  p.group = unit / c.strips;
  p.strip = unit % c.strips;
  p.part = index % c.parts;
  const std::int64_t first = index / c.parts * c.channels_per_piece;
  p.first = p.group * c.channels_per_group + first;
  p.channels = std::min(c.channels_per_piece, c.channels_per_group - first);
  p.begin = p.part * kRowsPerPiece;
  p.rows = std::min(kRowsPerPiece, shape.pixels - p.begin);
  p.image = p.strip * c.width;
  p.width = static_cast<int>(std::min(c.width, shape.images - p.image));
  return p;
}

// Where a channel of the piece begins.
std::int64_t offset(const GroupNormShape& shape, const Piece& p, std::int64_t channel) {
  return (channel * shape.pixels + p.begin) * shape.images + p.image;
}

// Chan's pairwise update.
void add(GroupMoments& to, const GroupMoments& piece, int width) {
  const double total = to.count + piece.count, weight = piece.count / total, between = to.count * weight;
  for (int i = 0; i < width; ++i) {
    const double delta = piece.mean[i] - to.mean[i];
    to.mean[i] += delta * weight;
    to.m2[i] += piece.m2[i] + delta * delta * between;
  }
  to.count = total;
}

void add(GroupSums& to, const GroupSums& piece, int width, double weight = 1.0) {
  for (int i = 0; i < width; ++i) {
    to.g[i] += weight * piece.g[i];
    to.g_xc[i] += weight * piece.g_xc[i];
  }
}

// result = gather(piece) for each piece of a unit, added up in their order; finish(unit, first piece, result); then
// write(unit, piece) for each. A thread writes the pieces that it has gathered from, beginning with the last, which its
// cache holds.
template <class Result, class Gather, class Finish, class Write>
void for_units(const GroupNormShape& shape, const Cut& c, const Gather& gather, const Finish& finish,
               const Write& write) {
  if (c.whole_units) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (std::int64_t unit = 0; unit < c.units; ++unit) {
      const Piece first = piece(shape, c, unit, 0);
      Result result = gather(first);
      for (std::int64_t i = 1; i < c.pieces; ++i) add(result, gather(piece(shape, c, unit, i)), first.width);
      finish(unit, first, result);
      for (std::int64_t i = c.pieces - 1; i >= 0; --i) write(unit, piece(shape, c, unit, i));
    }
    return;
  }
  const std::int64_t total = c.units * c.pieces;
  std::vector<Result> results(static_cast<std::size_t>(total));
#pragma omp parallel for num_threads(c.threads) schedule(static, 1)
  for (int thread = 0; thread < c.threads; ++thread) {
    for (std::int64_t i = total * thread / c.threads; i < total * (thread + 1) / c.threads; ++i) {
      results[static_cast<std::size_t>(i)] = gather(piece(shape, c, i / c.pieces, i % c.pieces));
    }
  }
  for (std::int64_t unit = 0; unit < c.units; ++unit) {
    const Piece first = piece(shape, c, unit, 0);
    Result* const result = results.data() + unit * c.pieces;
    for (std::int64_t i = 1; i < c.pieces; ++i) add(result[0], result[i], first.width);
    finish(unit, first, result[0]);
  }
#pragma omp parallel for num_threads(c.threads) schedule(static, 1)
  for (int thread = 0; thread < c.threads; ++thread) {
    for (std::int64_t i = total * (thread + 1) / c.threads - 1; i >= total * thread / c.threads; --i) {
      write(i / c.pieces, piece(shape, c, i / c.pieces, i % c.pieces));
    }
  }
}

template <class T>
GroupAffine<T> affine(const GroupNormShape& shape, const Piece& p, std::int64_t channel, const T* weight,
                      const T* bias, const T* mean, const T* invstd) {
  const std::int64_t at = p.group * shape.images + p.image;
  return {mean + at, invstd + at, weight != nullptr ? weight[channel] : T(1), bias != nullptr ? bias[channel] : T(0)};
}

// What some rows of a channel add to the gradients of its weight and bias.
struct Share {
  double weight, bias;
};

// The sums over the images, four at a time: one chain of additions would take longer than the rows of a small image.
template <class T>
Share over_images(const GroupSums& sums, const T* invstd, int width) {
  Share part[4] = {};
  const auto add_image = [&](Share& to, int image) {
    to.weight += sums.g_xc[image] * static_cast<double>(invstd[image]);
    to.bias += sums.g[image];
  };
  int image = 0;
  for (; image + 4 <= width; image += 4) {
    for (int i = 0; i < 4; ++i) add_image(part[i], image + i);
  }
  for (; image < width; ++image) add_image(part[0], image);
  return {(part[0].weight + part[1].weight) + (part[2].weight + part[3].weight),
          (part[0].bias + part[1].bias) + (part[2].bias + part[3].bias)};
}

}  // namespace

template <class T>
void group_norm_forward(GroupNormShape shape, const T* x, const T* weight, const T* bias, double eps, bool relu, T* y,
                        T* mean, T* invstd, int threads) {
  const GroupNormKernels<T>& k = group_norm_kernels<T>();
  const Cut c = cut(shape, k.lanes, threads);
  const auto gather = [&](const Piece& p) {
    GroupMoments moments;
    // Whole channels lie one after the other.
    k.moments(x + offset(shape, p, p.first), {p.channels * p.rows, shape.images, p.width}, &moments);
    return moments;
  };
  const auto finish = [&](std::int64_t, const Piece& p, const GroupMoments& moments) {
    const std::int64_t at = p.group * shape.images + p.image;
    for (int i = 0; i < p.width; ++i) {
      mean[at + i] = static_cast<T>(moments.mean[i]);
      invstd[at + i] = static_cast<T>(1.0 / std::sqrt(moments.m2[i] / moments.count + eps));
    }
  };
  const auto write = [&](std::int64_t, const Piece& p) {
    for (std::int64_t channel = p.first; channel < p.first + p.channels; ++channel) {
      const std::int64_t at = offset(shape, p, channel);
      (relu ? k.apply_relu : k.apply)(x + at, y + at, {p.rows, shape.images, p.width},
                                      affine(shape, p, channel, weight, bias, mean, invstd));
    }
  };
  for_units<GroupMoments>(shape, c, gather, finish, write);
}

template <class T>
void group_norm_backward(GroupNormShape shape, const T* dy, const T* x, const T* weight, const T* bias, const T* mean,
                         const T* invstd, bool relu, T* dx, T* dweight, T* dbias, int threads) {
  const GroupNormKernels<T>& k = group_norm_kernels<T>();
  const Cut c = cut(shape, k.lanes, threads);
  // What each piece adds to the gradients of its channels' weight and bias: [channel, part, strip].
  const std::int64_t shares_per_channel = c.parts * c.strips;
  std::vector<Share> shares(dweight != nullptr ? static_cast<std::size_t>(shape.channels * shares_per_channel) : 0);
  struct Pull {
    T mean_g[kGroupNormWidth], slope[kGroupNormWidth];
  };
  std::vector<Pull> pulls(static_cast<std::size_t>(c.units));

  const auto gather = [&](const Piece& p) {
    GroupSums weighted{};
    for (std::int64_t channel = p.first; channel < p.first + p.channels; ++channel) {
      const std::int64_t at = offset(shape, p, channel);
      const GroupAffine<T> a = affine(shape, p, channel, weight, bias, mean, invstd);
      GroupSums sums;
      (relu ? k.sums_relu : k.sums)(dy + at, x + at, {p.rows, shape.images, p.width}, a, &sums);
      if (dweight != nullptr) {
        Share& share = shares[static_cast<std::size_t>(channel * shares_per_channel + p.part * c.strips + p.strip)];
        share = over_images(sums, a.invstd, p.width);
      }
      add(weighted, sums, p.width, static_cast<double>(a.weight));
    }
    return weighted;
  };
  const auto finish = [&](std::int64_t unit, const Piece& p, const GroupSums& sums) {
    Pull& pull = pulls[static_cast<std::size_t>(unit)];
    const double count = static_cast<double>(c.channels_per_group * shape.pixels);
    for (int i = 0; i < p.width; ++i) {
      const double inv = static_cast<double>(invstd[p.group * shape.images + p.image + i]);
      pull.mean_g[i] = static_cast<T>(sums.g[i] / count);
      pull.slope[i] = static_cast<T>(sums.g_xc[i] * inv * inv / count);
    }
  };
  const auto write = [&](std::int64_t unit, const Piece& p) {
    if (dx == nullptr) return;
    const Pull& pull = pulls[static_cast<std::size_t>(unit)];
    for (std::int64_t channel = p.first; channel < p.first + p.channels; ++channel) {
      const std::int64_t at = offset(shape, p, channel);
      (relu ? k.dx_relu : k.dx)(dy + at, x + at, dx + at, {p.rows, shape.images, p.width},
                                affine(shape, p, channel, weight, bias, mean, invstd), {pull.mean_g, pull.slope});
    }
  };
  for_units<GroupSums>(shape, c, gather, finish, write);
  if (dweight == nullptr) return;
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    Share sum{};
    for (std::int64_t i = 0; i < shares_per_channel; ++i) {
      const Share& share = shares[static_cast<std::size_t>(channel * shares_per_channel + i)];
      sum.weight += share.weight;
      sum.bias += share.bias;
    }
    dweight[channel] = static_cast<T>(sum.weight);
    dbias[channel] = static_cast<T>(sum.bias);
  }
}

#define FEDPAI_INSTANTIATE(T)                                                                                          \
  template void group_norm_forward<T>(GroupNormShape, const T*, const T*, const T*, double, bool, T*, T*, T*, int);    \
  template void group_norm_backward<T>(GroupNormShape, const T*, const T*, const T*, const T*, const T*, const T*,     \
                                       bool, T*, T*, T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)
#undef FEDPAI_INSTANTIATE

}  // namespace fedpai
