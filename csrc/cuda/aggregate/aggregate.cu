// SPDX-License-Identifier: Apache-2.0
// Kernels and launchers of merging and of the server's steps; see aggregate.cuh and server_step.cuh.
#include "cuda/aggregate/aggregate.cuh"

#include "cuda/aggregate/server_step.cuh"
#include "cuda/common/launching.h"

namespace fedpai::cuda {
namespace {

constexpr int kThreads = 256;
// Their sums fill the 48 KiB of shared memory that every launch may have.
constexpr int kSegmentWarps = 2;
static_assert(sizeof(SegmentSums<true>) * kSegmentWarps <= 48 * 1024, "more would have to be asked for");
constexpr std::int64_t kMostBlocks = INT32_MAX;
constexpr std::int64_t kMostRows = 65535;  // of a grid

template <bool Compensated>
__global__ void __launch_bounds__(kThreads) aggregate_mean(const MeanArgs args) {
  mean_element<Compensated>(args, static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kThreads) aggregate_segments(const SegmentArgs args) {
  find_segments(args, static_cast<std::int32_t>(blockIdx.y), static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

template <bool Compensated>
__global__ void __launch_bounds__(kSegmentWarps * kWarp) aggregate_masked_mean(const MaskedMeanArgs args, std::int32_t segments) {
  __shared__ SegmentSums<Compensated> sums[kSegmentWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const auto segment = static_cast<std::int32_t>(blockIdx.x * kSegmentWarps) + warp;
  if (segment >= segments) return;
  merge_segment<Compensated>(args, DeviceWarp(), &sums[warp], segment);
}

__global__ void __launch_bounds__(kThreads) aggregate_majority(const MajorityArgs args) {
  vote(args, static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

template <ServerStep Rule, int V>
__global__ void __launch_bounds__(kThreads) aggregate_step(const ServerStepArgs args) {
  server_step<Rule, V>(args, static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

std::int64_t blocks_of(std::int64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace
}  // namespace fedpai::cuda

using namespace fedpai::cuda;

int fedpai_cuda_weighted_mean(const float* vectors, int64_t stride, const double* weights, int64_t clients, int64_t n,
                              int compensated, float* out, void* stream) {
  if (clients < 1 || clients > INT32_MAX - kClientsInFlight || n < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (blocks_of(n) > kMostBlocks) return FEDPAI_CUDA_TOO_LARGE;
  if (n == 0) return FEDPAI_CUDA_OK;
  const MeanArgs args{vectors, weights, out, stride, n, static_cast<std::int32_t>(clients)};
  const auto blocks = static_cast<unsigned>(blocks_of(n));
  if (compensated != 0) {
    aggregate_mean<true><<<blocks, kThreads, 0, stream_of(stream)>>>(args);
  } else {
    aggregate_mean<false><<<blocks, kThreads, 0, stream_of(stream)>>>(args);
  }
  return launched();
}

int64_t fedpai_cuda_segments(int64_t n) { return segments_of(n); }

int fedpai_cuda_find_segments(const int32_t* positions, const int64_t* offsets, int64_t clients, int64_t most_values,
                              int64_t n, int32_t* begins, int32_t* wrong, void* stream) {
  if (clients < 1 || clients > kMostRows || n < 0 || most_values < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (n > INT32_MAX - kSegment || most_values > INT32_MAX - kThreads) return FEDPAI_CUDA_TOO_LARGE;
  const std::int64_t segments = segments_of(n);
  // Where positions are wrong, some of these stay as they are here: the merge then reads nothing it should not.
  cudaError_t error = cudaMemsetAsync(begins, 0, static_cast<std::size_t>((segments + 1) * clients) * sizeof(int32_t), stream_of(stream));
  if (error == cudaSuccess) error = cudaMemsetAsync(wrong, 0, static_cast<std::size_t>(clients) * sizeof(int32_t), stream_of(stream));
  if (error != cudaSuccess) return static_cast<int>(error);
  const SegmentArgs args{positions, offsets, begins, wrong, static_cast<std::int32_t>(n), static_cast<std::int32_t>(clients),
                         static_cast<std::int32_t>(segments)};
  const dim3 grid(static_cast<unsigned>(blocks_of(most_values + 1)), static_cast<unsigned>(clients));
  aggregate_segments<<<grid, kThreads, 0, stream_of(stream)>>>(args);
  return launched();
}

int fedpai_cuda_masked_mean(const float* values, const int32_t* positions, const int64_t* offsets, const int32_t* begins,
                            const double* weights, int64_t clients, const float* old, int64_t n, int compensated,
                            float* out, void* stream) {
  if (clients < 1 || clients > kMostRows || n < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (n > INT32_MAX - kSegment) return FEDPAI_CUDA_TOO_LARGE;
  if (n == 0) return FEDPAI_CUDA_OK;
  const MaskedMeanArgs args{values, positions, offsets, begins, weights, old, out, static_cast<std::int32_t>(n),
                            static_cast<std::int32_t>(clients)};
  const auto segments = static_cast<std::int32_t>(segments_of(n));
  const auto blocks = static_cast<unsigned>((segments + kSegmentWarps - 1) / kSegmentWarps);
  if (compensated != 0) {
    aggregate_masked_mean<true><<<blocks, kSegmentWarps * kWarp, 0, stream_of(stream)>>>(args, segments);
  } else {
    aggregate_masked_mean<false><<<blocks, kSegmentWarps * kWarp, 0, stream_of(stream)>>>(args, segments);
  }
  return launched();
}

int fedpai_cuda_majority(const uint8_t* bitmaps, int64_t stride, int64_t clients, int64_t threshold, int64_t bytes,
                         uint8_t* out, void* stream) {
  if (clients < 1 || clients > kMostVoters || threshold < 1 || threshold > clients || bytes < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
  const std::int64_t blocks = blocks_of((bytes + kVoteBytes - 1) / kVoteBytes);
  if (blocks > kMostBlocks) return FEDPAI_CUDA_TOO_LARGE;
  if (bytes == 0) return FEDPAI_CUDA_OK;
  const MajorityArgs args{bitmaps, out, stride, bytes, static_cast<std::int32_t>(clients), static_cast<std::int32_t>(threshold)};
  aggregate_majority<<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(args);
  return launched();
}

int fedpai_cuda_server_step(const FedpaiServerStep* step, const float* old, const float* merged, float* m, float* v, int64_t n,
                            float* out, void* stream) {
  const ServerStepArgs args = server_step_args(*step, old, merged, m, v, n, out);
  if (const int error = check_server_step(*step, args)) return error;
  if (n == 0) return FEDPAI_CUDA_OK;
  return with_rule(*step, args, [&](auto form) {
    using Form = decltype(form);
    const std::int64_t blocks = blocks_of((n + Form::elements - 1) / Form::elements);
    if (blocks > kMostBlocks) return static_cast<int>(FEDPAI_CUDA_TOO_LARGE);
    aggregate_step<Form::rule, Form::elements><<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(args);
    return launched();
  });
}
