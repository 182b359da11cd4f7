// SPDX-License-Identifier: Apache-2.0
// The CUDA batch norm on the CPU: what csrc/cuda/norm/launch.h launches, as plain loops over thread blocks and warps.
#pragma once

#include <cstdint>

#include "cuda/norm/launch.h"

namespace fedpai::cuda {

// Device of launch.h: a GPU of so many SMs.
struct HostDevice {
  int sms;

  int count_sms(int* found) const {
    *found = sms;
    return FEDPAI_CUDA_OK;
  }

  template <int V, class T>
  int normalise_rows(const NormForwardArgs<T>& a, const NormCut& cut) const {
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      const auto blocks = [&](const auto& body) { for_blocks(cut.row_warps, 0, a.blocks, body); };
      blocks([&](std::int32_t b) { reduce_moments<V>(a.x, RowBlock(channel, a.row, b), HostWarp(), partial_of(a, channel, b)); });
      const ChannelMap map = forward_map(a, HostWarp(), channel, true);
      if (a.y != nullptr) blocks([&](std::int32_t b) { normalise_block<V>(a, HostWarp(), map, channel, b); });
    }
    return FEDPAI_CUDA_OK;
  }
  template <int V, class T>
  int moments(const NormForwardArgs<T>& a, const NormCut& cut) const {
    return for_pieces(a, cut, [&](std::int64_t channel, std::int32_t begin, std::int32_t end, bool) {
      for_blocks(kPieceWarps, begin, end, [&](std::int32_t b) {
        reduce_moments<V>(a.x, RowBlock(channel, a.row, b), HostWarp(), partial_of(a, channel, b));
      });
    });
  }
  template <int V, class T>
  int normalise(const NormForwardArgs<T>& a, const NormCut& cut) const {
    return for_pieces(a, cut, [&](std::int64_t channel, std::int32_t begin, std::int32_t end, bool is_first) {
      const ChannelMap map = forward_map(a, HostWarp(), channel, is_first);
      for_blocks(kPieceWarps, begin, end, [&](std::int32_t b) { normalise_block<V>(a, HostWarp(), map, channel, b); });
    });
  }
  template <class T>
  int finish(const NormForwardArgs<T>& a) const {
    for (std::int64_t channel = 0; channel < a.channels; ++channel) forward_map(a, HostWarp(), channel, true);
    return FEDPAI_CUDA_OK;
  }

  template <int V, class T>
  int differentiate_rows(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      const auto blocks = [&](const auto& body) { for_blocks(cut.row_warps, 0, a.blocks, body); };
      const ChannelMap map = backward_map(a, channel);
      blocks([&](std::int32_t b) { reduce_gradient<V>(a, HostWarp(), map, channel, b); });
      if (!a.wants_sums) continue;
      const ChannelPull pull = backward_pull(a, HostWarp(), channel, true);
      if (a.has_second_look()) blocks([&](std::int32_t b) { pull_block<V>(a, HostWarp(), map, pull, channel, b); });
    }
    return FEDPAI_CUDA_OK;
  }
  template <int V, class T>
  int gradients(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    return for_pieces(a, cut, [&](std::int64_t channel, std::int32_t begin, std::int32_t end, bool) {
      const ChannelMap map = backward_map(a, channel);
      for_blocks(kPieceWarps, begin, end, [&](std::int32_t b) { reduce_gradient<V>(a, HostWarp(), map, channel, b); });
    });
  }
  template <int V, class T>
  int pull(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    return for_pieces(a, cut, [&](std::int64_t channel, std::int32_t begin, std::int32_t end, bool is_first) {
      const ChannelMap map = backward_map(a, channel);
      const ChannelPull own = backward_pull(a, HostWarp(), channel, is_first);
      for_blocks(kPieceWarps, begin, end, [&](std::int32_t b) { pull_block<V>(a, HostWarp(), map, own, channel, b); });
    });
  }
  template <class T>
  int finish(const NormBackwardArgs<T>& a) const {
    for (std::int64_t channel = 0; channel < a.channels; ++channel) backward_pull(a, HostWarp(), channel, true);
    return FEDPAI_CUDA_OK;
  }

 private:
  template <class Args>
  static BlockSums* partial_of(const Args& a, std::int64_t channel, std::int32_t block) {
    return a.partial + (channel * a.blocks + block);
  }
  template <class F>
  static void for_blocks(int warps, std::int32_t begin, std::int32_t end, const F& body) {
    for (int warp = 0; warp < warps; ++warp) {
      for (std::int32_t b = begin + warp; b < end; b += warps) body(b);
    }
  }
  template <class Args, class F>
  static int for_pieces(const Args& a, const NormCut& cut, const F& body) {
    for (std::int64_t channel = 0; channel < a.channels; ++channel) {
      for (std::int32_t piece = 0; piece < cut.pieces; ++piece) {
        const std::int32_t begin = piece * cut.piece;
        body(channel, begin, a.blocks - begin < cut.piece ? a.blocks : begin + cut.piece, piece == 0);
      }
    }
    return FEDPAI_CUDA_OK;
  }
};

}  // namespace fedpai::cuda
