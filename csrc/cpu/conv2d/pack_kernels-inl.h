// SPDX-License-Identifier: Apache-2.0
// Packing a patch of the source, with its norm, and its inverse for a dest that no tile can store to; one copy per instruction
// set. kernels.h says what a packed patch looks like.
#pragma once

#include "cpu/conv2d/kernels.h"
#include "cpu/norm/activation-inl.h"

namespace fedpai::FEDPAI_TARGET {
namespace {

template <class T>
FEDPAI_INLINE void zero_pixels(T* packed, std::int64_t vectors) {
  for (std::int64_t i = 0; i < vectors; ++i) Vec<T>::store(packed + i * Vec<T>::lanes, Vec<T>::zero());
}

template <class T, int Blocks>
FEDPAI_INLINE void copy_vectors(T* to, const T* from, int blocks) {
  using V = Vec<T>;
  if constexpr (Blocks > 0) {
FEDPAI_UNROLL
    for (int b = 0; b < Blocks; ++b) V::store(to + b * V::lanes, V::loadu(from + b * V::lanes));
  } else {
    for (int b = 0; b < blocks; ++b) V::store(to + b * V::lanes, V::loadu(from + b * V::lanes));
  }
}

// Copies pixels whose images are adjacent and all present: `blocks` vectors, `Blocks` if that is not 0, to each group.
template <class T, int Blocks>
FEDPAI_INLINE void copy_full(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks,
                             std::int64_t groups, std::int64_t packed_group) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; ++i) {
    T* to = packed;
    const T* from = source;
    for (std::int64_t g = 0; g < groups; ++g) {
      copy_vectors<T, Blocks>(to, from, blocks);
      to += packed_group;
      from += blocks * V::lanes;
    }
    packed += blocks * V::lanes;
    source += step;
  }
}

template <class T>
FEDPAI_INLINE void copy_partial(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks, int valid) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int b = 0; b < blocks; ++b) {
      const int left = valid - b * V::lanes;
      const int n = left < 0 ? 0 : (left > V::lanes ? V::lanes : left);
      V::store(packed + b * V::lanes, n == 0 ? V::zero() : V::load_partial(source + b * V::lanes, n));
    }
    packed += blocks * V::lanes;
    source += step;
  }
}

template <class T>
FEDPAI_INLINE void copy_strided(T* packed, const T* source, std::int64_t count, std::int64_t step, int blocks, int valid,
                                std::int64_t lane_step) {
  const int width = blocks * Vec<T>::lanes;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int n = 0; n < valid; ++n) packed[n] = source[n * lane_step];
    for (int n = valid; n < width; ++n) packed[n] = T(0);
    packed += width;
    source += step;
  }
}

// Normalises packed pixels, which lie in L1 from being packed. Lanes from `valid` on stay zero.
template <class T, ActivationKind Kind>
void normalise_packed(T* packed, std::int64_t count, int blocks, int valid, NormAffine<T> p, T slope) {
  using V = Vec<T>;
  using reg = typename V::reg;
  const reg mean = V::set1(p.mean), scale = V::set1(p.scale), shift = V::set1(p.shift), leak = V::set1(slope);
  for (std::int64_t i = 0; i < count; ++i) {
    for (int b = 0; b < blocks; ++b, packed += V::lanes) {
      // Rounded as in norm_apply_rows, so that a result does not depend on where it was normalised.
      const reg v = Activated<T, Kind>::apply(V::fma(V::sub(V::load(packed), mean), scale, shift), leak);
      const int left = valid - b * V::lanes;
      if (left >= V::lanes) V::store(packed, v);
      else if (left > 0) V::store_partial(packed, v, left);
    }
  }
}

// By ActivationKind.
template <class T>
constexpr void (*kNormalisePacked[kActivationKinds])(T*, std::int64_t, int, int, NormAffine<T>, T) = {
    normalise_packed<T, kNone>, normalise_packed<T, kRelu>, normalise_packed<T, kRelu6>,
    normalise_packed<T, kLeakyRelu>, normalise_packed<T, kSilu>, normalise_packed<T, kGelu>,
    normalise_packed<T, kGeluTanh>};

// Rows of a matrix: images of one pixel whose channels are adjacent. A square of as many images and channels as a vector has
// lanes is transposed in registers.
template <class T>
void pack_matrix(const PackArgs<T>& a) {
  using V = Vec<T>;
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * V::lanes;
  T* const packed = a.packed + a.segments->packed;
  for (std::int64_t n = 0; n < a.groups * width; n += V::lanes) {
    T* const to = packed + n / width * a.packed_group + n % width;
    const T* const from = a.source + a.segments->source + n * a.source_lane;
    const std::int64_t left = a.images - n;
    const int valid = static_cast<int>(left < 0 ? 0 : (left < V::lanes ? left : V::lanes));
    std::int64_t c = 0;
    while (c < a.channel_count) {
      const std::int64_t channel = a.channels != nullptr ? a.channels[c] : c, last = c + V::lanes - 1;
      if (valid == V::lanes && last < a.channel_count &&
          (a.channels == nullptr || a.channels[last] - channel == V::lanes - 1)) {
        typename V::reg square[V::lanes];
        for (int i = 0; i < V::lanes; ++i) square[i] = V::loadu(from + i * a.source_lane + channel);
        V::transpose(square);
        for (int i = 0; i < V::lanes; ++i) V::store(to + (c + i) * a.plane, square[i]);
        c += V::lanes;
      } else {
        for (int i = 0; i < V::lanes; ++i) to[c * a.plane + i] = i < valid ? from[i * a.source_lane + channel] : T(0);
        ++c;
      }
    }
  }
}

template <class T>
void pack(const PackArgs<T>& a) {
  if (a.source_lane != 1 && a.source_channel == 1 && a.norm == nullptr && a.segment_count == 1 && a.segments->count == 1 &&
      a.segments->left == 0 && a.segments->right == 0) {
    pack_matrix(a);
    return;
  }
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * Vec<T>::lanes;
  const bool adjacent = a.source_lane == 1;
  const std::int64_t full = adjacent ? a.images / width : 0;  // groups that need no care; one more at most if adjacent
  for (std::int64_t c = 0; c < a.channel_count; ++c) {
    const std::int64_t channel = a.channels != nullptr ? a.channels[c] : c;
    const T* const source_plane = a.source + channel * a.source_channel;
    T* const plane = a.packed + c * a.plane;
    for (std::int64_t s = 0; s < a.segment_count; ++s) {
      const PackSegment& segment = a.segments[s];
      T* const first = plane + segment.packed;
      T* const packed = first + segment.left * width;
      for (int g = 0; g < a.groups; ++g) {
        zero_pixels(first + g * a.packed_group, static_cast<std::int64_t>(segment.left) * a.blocks);
        zero_pixels(packed + segment.count * width + g * a.packed_group,
                    static_cast<std::int64_t>(segment.right) * a.blocks);
      }
      const T* const source = source_plane + segment.source;
      if (a.blocks == 1) {
        copy_full<T, 1>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      } else if (a.blocks == 2) {
        copy_full<T, 2>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      } else {
        copy_full<T, 0>(packed, source, segment.count, segment.step, a.blocks, full, a.packed_group);
      }
      for (std::int64_t g = full; g < a.groups; ++g) {
        const std::int64_t left = a.images - g * width;
        const int valid = static_cast<int>(left < width ? left : width);
        T* const to = packed + g * a.packed_group;
        const T* const from = source + g * width * a.source_lane;
        if (adjacent) copy_partial(to, from, segment.count, segment.step, a.blocks, valid);
        else copy_strided(to, from, segment.count, segment.step, a.blocks, valid, a.source_lane);
      }
      if (a.norm == nullptr) continue;
      const auto normalise_row = kNormalisePacked<T>[a.norm->activation.kind];
      const T slope = static_cast<T>(a.norm->activation.slope);
      for (std::int64_t g = 0; g < a.groups; ++g) {
        const std::int64_t left = a.images - g * width;
        const int valid = static_cast<int>(left < width ? left : width);
        normalise_row(packed + g * a.packed_group, segment.count, a.blocks, valid, a.norm->channel[channel],
                      slope);
      }
    }
  }
}

template <class T>
void unpack(const UnpackArgs<T>& a) {
  using V = Vec<T>;
  const std::int64_t width = static_cast<std::int64_t>(a.blocks) * V::lanes;
  for (std::int64_t i = 0; i < a.channel_count; ++i) {
    const std::int64_t c = a.channels[i];
    for (std::int64_t y = 0; y < a.rows; ++y) {
      const T* packed = a.packed + c * a.plane + y * a.packed_row;
      T* dest = a.dest + c * a.dest_channel + y * a.dest_row;
      for (std::int64_t x = 0; x < a.columns; ++x, packed += width, dest += a.dest_column) {
        if (a.dest_lane == 1) {
          int left = a.lanes_valid;
          for (int b = 0; left > 0; ++b, left -= V::lanes) {
            V::store_partial(dest + b * V::lanes, V::load(packed + b * V::lanes), left < V::lanes ? left : V::lanes);
          }
        } else {
          for (int n = 0; n < a.lanes_valid; ++n) dest[n * a.dest_lane] = packed[n];
        }
      }
    }
  }
}

}  // namespace
}  // namespace fedpai::FEDPAI_TARGET
