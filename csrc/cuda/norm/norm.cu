// SPDX-License-Identifier: Apache-2.0
// Kernels and launchers of batch norm. What a warp does is in statistics.cuh and norm.cuh, which kernels a call runs in
// launch.h.
#include "cuda/norm/launch.h"

#include "cuda/common/launching.h"

namespace fedpai::cuda {
namespace {

constexpr int kPieceThreads = kPieceWarps * kWarp, kRowThreads = kMostRowWarps * kWarp;
// Thread blocks to an SM: both kinds leave up to 64 registers a thread.
constexpr int kPiecesPerSm = 4, kRowsPerSm = 2;

__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x / kWarp); }

// body(block) for this warp's blocks of a row, from `begin` up to `end`.
template <class F>
__device__ __forceinline__ void for_blocks(std::int32_t begin, std::int32_t end, const F& body) {
  for (std::int32_t b = begin + warp_of_block(); b < end; b += static_cast<std::int32_t>(blockDim.x / kWarp)) body(b);
}

// What one warp computes, given to all threads of the block.
template <class Result, class F>
__device__ __forceinline__ Result by_first_warp(const F& body) {
  __shared__ Result shared;
  if (warp_of_block() == 0) {
    const Result own = body();
    if (threadIdx.x == 0) shared = own;
  }
  __syncthreads();
  return shared;
}

struct Piece {
  std::int64_t channel;
  std::int32_t begin, end;  // blocks
  bool is_first;

  __device__ __forceinline__ Piece(std::int32_t blocks, std::int32_t piece, std::int32_t pieces) {
    channel = blockIdx.x / static_cast<std::uint32_t>(pieces);
    const auto index = static_cast<std::int32_t>(blockIdx.x - static_cast<std::uint32_t>(channel) * static_cast<std::uint32_t>(pieces));
    begin = index * piece;
    end = blocks - begin < piece ? blocks : begin + piece;
    is_first = index == 0;
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowsPerSm) norm_rows(const NormForwardArgs<T> args) {
  const DeviceWarp warp;
  const std::int64_t channel = blockIdx.x;
  for_blocks(0, args.blocks, [&](std::int32_t b) {
    reduce_moments<V>(args.x, RowBlock(channel, args.row, b), warp, args.partial + (channel * args.blocks + b));
  });
  __syncthreads();
  const auto map = by_first_warp<ChannelMap>([&] { return forward_map(args, warp, channel, true); });
  if (args.y == nullptr) return;
  for_blocks(0, args.blocks, [&](std::int32_t b) { normalise_block<V>(args, warp, map, channel, b); });
}

template <class T, int V>
__global__ void __launch_bounds__(kPieceThreads, kPiecesPerSm)
    norm_moments(const NormForwardArgs<T> args, std::int32_t piece, std::int32_t pieces) {
  const Piece own(args.blocks, piece, pieces);
  for_blocks(own.begin, own.end, [&](std::int32_t b) {
    reduce_moments<V>(args.x, RowBlock(own.channel, args.row, b), DeviceWarp(), args.partial + (own.channel * args.blocks + b));
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kPieceThreads, kPiecesPerSm)
    norm_normalise(const NormForwardArgs<T> args, std::int32_t piece, std::int32_t pieces) {
  const DeviceWarp warp;
  const Piece own(args.blocks, piece, pieces);
  const auto map = by_first_warp<ChannelMap>([&] { return forward_map(args, warp, own.channel, own.is_first); });
  for_blocks(own.begin, own.end, [&](std::int32_t b) { normalise_block<V>(args, warp, map, own.channel, b); });
}

// Statistics alone: a warp for each channel.
template <class T>
__global__ void __launch_bounds__(kPieceThreads) norm_statistics(const NormForwardArgs<T> args) {
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kPieceWarps + warp_of_block();
  if (channel < args.channels) forward_map(args, DeviceWarp(), channel, true);
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, kRowsPerSm) norm_rows_backward(const NormBackwardArgs<T> args) {
  const DeviceWarp warp;
  const std::int64_t channel = blockIdx.x;
  const ChannelMap map = backward_map(args, channel);
  for_blocks(0, args.blocks, [&](std::int32_t b) { reduce_gradient<V>(args, warp, map, channel, b); });
  if (!args.wants_sums) return;
  __syncthreads();
  const auto pull = by_first_warp<ChannelPull>([&] { return backward_pull(args, warp, channel, true); });
  if (!args.has_second_look()) return;
  for_blocks(0, args.blocks, [&](std::int32_t b) { pull_block<V>(args, warp, map, pull, channel, b); });
}

template <class T, int V>
__global__ void __launch_bounds__(kPieceThreads, kPiecesPerSm)
    norm_gradients(const NormBackwardArgs<T> args, std::int32_t piece, std::int32_t pieces) {
  const Piece own(args.blocks, piece, pieces);
  const ChannelMap map = backward_map(args, own.channel);
  for_blocks(own.begin, own.end, [&](std::int32_t b) { reduce_gradient<V>(args, DeviceWarp(), map, own.channel, b); });
}

template <class T, int V>
__global__ void __launch_bounds__(kPieceThreads, kPiecesPerSm)
    norm_pull(const NormBackwardArgs<T> args, std::int32_t piece, std::int32_t pieces) {
  const DeviceWarp warp;
  const Piece own(args.blocks, piece, pieces);
  const ChannelMap map = backward_map(args, own.channel);
  const auto pull = by_first_warp<ChannelPull>([&] { return backward_pull(args, warp, own.channel, own.is_first); });
  for_blocks(own.begin, own.end, [&](std::int32_t b) { pull_block<V>(args, warp, map, pull, own.channel, b); });
}

// Gradients of weight and bias alone: a warp for each channel.
template <class T>
__global__ void __launch_bounds__(kPieceThreads) norm_parameters(const NormBackwardArgs<T> args) {
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kPieceWarps + warp_of_block();
  if (channel < args.channels) backward_pull(args, DeviceWarp(), channel, true);
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Device of launch.h: a stream of the current device.
class Gpu {
 public:
  explicit Gpu(void* stream) : stream_(stream_of(stream)) {}

  int count_sms(int* sms) const { return cuda::count_sms(sms); }

  template <int V, class T>
  int normalise_rows(const NormForwardArgs<T>& a, const NormCut& cut) const {
    return rows(norm_rows<T, V>, a, cut);
  }
  template <int V, class T>
  int moments(const NormForwardArgs<T>& a, const NormCut& cut) const {
    return pieces(norm_moments<T, V>, a, cut);
  }
  template <int V, class T>
  int normalise(const NormForwardArgs<T>& a, const NormCut& cut) const {
    return pieces(norm_normalise<T, V>, a, cut);
  }
  template <class T>
  int finish(const NormForwardArgs<T>& a) const {
    return channels(norm_statistics<T>, a);
  }

  template <int V, class T>
  int differentiate_rows(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    return rows(norm_rows_backward<T, V>, a, cut);
  }
  template <int V, class T>
  int gradients(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    return pieces(norm_gradients<T, V>, a, cut);
  }
  template <int V, class T>
  int pull(const NormBackwardArgs<T>& a, const NormCut& cut) const {
    return pieces(norm_pull<T, V>, a, cut);
  }
  template <class T>
  int finish(const NormBackwardArgs<T>& a) const {
    return channels(norm_parameters<T>, a);
  }

 private:
  template <class Args>
  int rows(void (*kernel)(const Args), const Args& a, const NormCut& cut) const {
    kernel<<<static_cast<unsigned>(a.channels), static_cast<unsigned>(cut.row_warps * kWarp), 0, stream_>>>(a);
    return launched();
  }
  template <class Args>
  int pieces(void (*kernel)(const Args, std::int32_t, std::int32_t), const Args& a, const NormCut& cut) const {
    kernel<<<static_cast<unsigned>(a.channels * cut.pieces), kPieceThreads, 0, stream_>>>(a, cut.piece, cut.pieces);
    return launched();
  }
  template <class Args>
  int channels(void (*kernel)(const Args), const Args& a) const {
    kernel<<<static_cast<unsigned>((a.channels + kPieceWarps - 1) / kPieceWarps), kPieceThreads, 0, stream_>>>(a);
    return launched();
  }

  cudaStream_t stream_;
};

}  // namespace
}  // namespace fedpai::cuda

using namespace fedpai::cuda;

int fedpai_cuda_norm_workspace(const FedpaiNorm* norm, int64_t* bytes) {
  if (const int error = check_norm(*norm)) return error;
  *bytes = workspace_bytes_of(*norm);
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_norm_train(const FedpaiNorm* norm, const void* x, const void* r, const float* weight, const float* bias, double eps,
                           float* running_mean, float* running_var, double momentum, void* y, float* stats, void* workspace,
                           int64_t workspace_bytes, void* stream) {
  return norm_train(Gpu(stream), *norm, x, r, weight, bias, eps, running_mean, running_var, momentum, y, stats, workspace,
                    workspace_bytes);
}

int fedpai_cuda_norm_eval(const FedpaiNorm* norm, const void* x, const void* r, const float* weight, const float* bias,
                          const float* mean, const float* var, double eps, void* y, float* stats, void* stream) {
  return norm_eval(Gpu(stream), *norm, x, r, weight, bias, mean, var, eps, y, stats);
}

int fedpai_cuda_norm_apply(const FedpaiNorm* norm, const void* x, const float* weight, const float* bias, const float* stats, void* y,
                           void* stream) {
  return norm_apply(Gpu(stream), *norm, x, weight, bias, stats, y);
}

int fedpai_cuda_norm_backward(const FedpaiNorm* norm, const void* dy, const void* x, const void* z, const float* weight,
                              const float* bias, const float* stats, int through_statistics, void* dx, void* dr, float* dweight,
                              float* dbias, void* workspace, int64_t workspace_bytes, void* stream) {
  return norm_backward(Gpu(stream), *norm, dy, x, z, weight, bias, stats, through_statistics != 0, dx, dr, dweight, dbias, workspace,
                       workspace_bytes);
}
