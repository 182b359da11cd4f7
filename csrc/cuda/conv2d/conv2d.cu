// SPDX-License-Identifier: Apache-2.0
// Kernels and launchers of the sparse convolution. What a warp does is in gather.cuh and weight_grad.cuh, what a launch
// consists of in launch.h.
#include "cuda/conv2d/launch.h"

#include "cuda/common/launching.h"

namespace fedpai::cuda {
namespace {

constexpr int kFinishThreads = 256;

// Blocks of kMostWarps warps, two to an SM: up to 64 registers a thread.
template <class T, int V, int P>
__global__ void __launch_bounds__(kMostWarps * kWarp, 2) conv2d_gather(const GatherArgs<T> args) {
  __shared__ Record records[kMostWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x / kWarp), warps = static_cast<int>(blockDim.x / kWarp);
  const GatherWork work = gather_work(args.rows, warps, blockIdx.x, warp);
  if (work.rank >= args.rows) return;
  const auto pass = static_cast<std::int32_t>(blockIdx.y);
  const std::int32_t row = args.row_order[static_cast<std::int64_t>(pass) * args.rows + work.rank];
  gather_row<T, V, P>(args, DeviceWarp(), records[warp], row, work.tile, pass, static_cast<std::int32_t>(blockIdx.z));
}

template <class T, int V, int P>
__global__ void __launch_bounds__(kMostWarps * kWarp, 2)
    conv2d_weight_grad(const WeightGradArgs<T> args, std::uint32_t tiles, std::int64_t groups) {
  __shared__ GroupScratch scratch[kMostWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (group >= groups) return;
  const SplitRange range = tiles_of_split(tiles, gridDim.y, blockIdx.y);
  reduce_group<T, V, P>(args, DeviceWarp(), &scratch[warp], args.groups[group], range.begin, range.end,
                        static_cast<std::int32_t>(blockIdx.y), static_cast<std::int32_t>(blockIdx.z));
}

__global__ void __launch_bounds__(kFinishThreads) conv2d_weight_grad_finish(const FinishArgs args) {
  add_splits(args, static_cast<std::int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x, blockIdx.y);
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Vectors are read and written whole.
int check_images(const FedpaiConv2d& c, const Strip& strip, const void* a, const void* b) {
  const auto bytes = static_cast<std::uintptr_t>(element_size(c) * strip.images);
  return is_aligned(a, bytes) && is_aligned(b, bytes) ? FEDPAI_CUDA_OK : FEDPAI_CUDA_MISALIGNED;
}

int check_conv(const FedpaiConv2d& c, std::int64_t entry_count) {
  if (c.dtype != FEDPAI_CUDA_F32 && c.dtype != FEDPAI_CUDA_BF16) return FEDPAI_CUDA_BAD_ARGUMENT;
  return check_size(c, entry_count);
}

// A strip's sizes as constants.
template <int V, int P>
struct StripOf {
  static constexpr int images = V, pixels = P;
};

template <class F>
void with_strip(const Strip& strip, const F& body) {
  if (strip.images == 1) return body(StripOf<1, 2>());
  if (strip.pixels == 4) return body(StripOf<4, 4>());
  if (strip.pixels == 2) return body(StripOf<4, 2>());
  body(StripOf<4, 1>());
}

template <class T>
int launch_gather(const GatherArgs<T>& args, const GatherLaunch& launch, void* stream) {
  if (launch.blocks == 0 || launch.clients == 0) return FEDPAI_CUDA_OK;
  const dim3 grid(static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.passes), static_cast<unsigned>(launch.clients));
  const auto threads = static_cast<unsigned>(launch.warps * kWarp);
  with_strip(launch.strip, [&](auto strip) {
    conv2d_gather<T, decltype(strip)::images, decltype(strip)::pixels><<<grid, threads, 0, stream_of(stream)>>>(args);
  });
  return launched();
}

template <class T>
int launch_weight_grad(const WeightGradArgs<T>& args, const WeightGradLaunch& launch, std::int64_t groups, void* stream) {
  const dim3 grid(static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.splits), static_cast<unsigned>(launch.clients));
  const auto threads = static_cast<unsigned>(launch.warps * kWarp);
  const auto tiles = static_cast<std::uint32_t>(launch.tiles.count());
  with_strip(launch.strip, [&](auto strip) {
    conv2d_weight_grad<T, decltype(strip)::images, decltype(strip)::pixels><<<grid, threads, 0, stream_of(stream)>>>(args, tiles, groups);
  });
  return launched();
}

std::int64_t workspace_bytes_of(const FedpaiConv2d& c, const FedpaiGroupStream& s, const WeightGradLaunch& launch) {
  return c.clients * launch.splits * (s.entry_count + c.out_channels) * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace
}  // namespace fedpai::cuda

using namespace fedpai::cuda;

int fedpai_cuda_conv2d_forward(const FedpaiConv2d* conv, const FedpaiRowStream* by_output, const void* x,
                               const float* values, const float* bias, void* y, void* stream) {
  int sms = 0;
  if (const int error = check_conv(*conv, by_output->entry_count)) return error;
  if (const int error = count_sms(&sms)) return error;
  const GatherLaunch launch = forward_launch(*conv, sms);
  if (const int error = check_images(*conv, launch.strip, x, y)) return error;
  const auto run = [&](auto* source, auto* dest) {
    return launch_gather(forward_args(*conv, *by_output, launch, source, values, bias, dest), launch, stream);
  };
  if (conv->dtype == FEDPAI_CUDA_F32) return run(static_cast<const float*>(x), static_cast<float*>(y));
  return run(static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y));
}

int fedpai_cuda_conv2d_input_grad(const FedpaiConv2d* conv, const FedpaiRowStream* by_input, const void* dy,
                                  const float* values, void* dx, void* stream) {
  int sms = 0;
  if (const int error = check_conv(*conv, by_input->entry_count)) return error;
  if (const int error = count_sms(&sms)) return error;
  const GatherLaunch launch = input_grad_launch(*conv, sms);
  if (const int error = check_images(*conv, launch.strip, dy, dx)) return error;
  const auto run = [&](auto* source, auto* dest) {
    return launch_gather(input_grad_args(*conv, *by_input, launch, source, values, dest), launch, stream);
  };
  if (conv->dtype == FEDPAI_CUDA_F32) return run(static_cast<const float*>(dy), static_cast<float*>(dx));
  return run(static_cast<const BFloat16*>(dy), static_cast<BFloat16*>(dx));
}

int fedpai_cuda_conv2d_weight_grad_workspace(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group, int64_t* bytes) {
  int sms = 0;
  if (const int error = check_conv(*conv, by_group->entry_count)) return error;
  if (const int error = count_sms(&sms)) return error;
  *bytes = workspace_bytes_of(*conv, *by_group, weight_grad_launch(*conv, by_group->group_count, sms));
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_conv2d_weight_grad(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group, const void* x,
                                   const void* dy, float* dvalues, float* dbias, void* workspace, int64_t workspace_bytes,
                                   void* stream) {
  int sms = 0;
  if (const int error = check_conv(*conv, by_group->entry_count)) return error;
  if (const int error = count_sms(&sms)) return error;
  const WeightGradLaunch launch = weight_grad_launch(*conv, by_group->group_count, sms);
  if (launch.clients == 0) return FEDPAI_CUDA_OK;
  if (const int error = check_images(*conv, launch.strip, x, dy)) return error;
  if (workspace_bytes < workspace_bytes_of(*conv, *by_group, launch)) return FEDPAI_CUDA_WORKSPACE;
  if (!is_aligned(workspace, sizeof(float))) return FEDPAI_CUDA_MISALIGNED;
  auto* const partial = static_cast<float*>(workspace);
  const auto run = [&](auto* source, auto* grad) {
    const auto args = weight_grad_args(*conv, *by_group, launch, source, grad, partial, dbias != nullptr);
    return launch_weight_grad(args, launch, by_group->group_count, stream);
  };
  const int error = conv->dtype == FEDPAI_CUDA_F32 ? run(static_cast<const float*>(x), static_cast<const float*>(dy))
                                                   : run(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(dy));
  if (error != FEDPAI_CUDA_OK) return error;
  const std::int64_t slots = by_group->entry_count + (dbias != nullptr ? conv->out_channels : 0);
  const FinishArgs finish{partial, static_cast<const Entry*>(by_group->entries), dvalues, dbias,
                          static_cast<std::int32_t>(by_group->entry_count), static_cast<std::int32_t>(conv->out_channels), launch.splits};
  const dim3 grid(static_cast<unsigned>(divided_up(slots, kFinishThreads)), static_cast<unsigned>(launch.clients));
  conv2d_weight_grad_finish<<<grid, kFinishThreads, 0, stream_of(stream)>>>(finish);
  return launched();
}
