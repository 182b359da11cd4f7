// SPDX-License-Identifier: Apache-2.0
// The interface of libfedpai_cuda.so with the CPU as its device: tests/conftest.py compiles and loads it in the library's
// place, so that everything between a tensor and a kernel's arguments is run. Convolution, batch norm, clients' means and
// the server's steps.
#include <vector>

#include "cuda_host.h"
#include "cuda_host_aggregate.h"
#include "cuda_host_norm.h"
#include "cuda_host_step.h"

using namespace fedpai::cuda;

namespace {

constexpr int kSms = 4;

int check(const FedpaiConv2d& c, std::int64_t entry_count) {
  if (c.dtype != FEDPAI_CUDA_F32 && c.dtype != FEDPAI_CUDA_BF16) return FEDPAI_CUDA_BAD_ARGUMENT;
  return check_size(c, entry_count);
}

template <class T>
void weight_grad(const FedpaiConv2d& c, const FedpaiGroupStream& s, const void* x, const void* dy, float* dvalues,
                 float* dbias, void* workspace) {
  const WeightGradLaunch launch = weight_grad_launch(c, s.group_count, kSms);
  auto* const partial = static_cast<float*>(workspace);
  run(weight_grad_args(c, s, launch, static_cast<const T*>(x), static_cast<const T*>(dy), partial, dbias != nullptr), launch,
      s.group_count);
  const FinishArgs finish{partial, static_cast<const Entry*>(s.entries), dvalues, dbias, static_cast<std::int32_t>(s.entry_count),
                          static_cast<std::int32_t>(c.out_channels), launch.splits};
  run(finish, launch);
}

}  // namespace

extern "C" {

int fedpai_cuda_interface(void) { return FEDPAI_CUDA_INTERFACE; }

int fedpai_cuda_device_count(int* count) {
  *count = 1;
  return FEDPAI_CUDA_OK;
}

const char* fedpai_cuda_message(int code) { return code == FEDPAI_CUDA_TOO_LARGE ? "too large" : "something else"; }

int fedpai_cuda_conv2d_forward(const FedpaiConv2d* conv, const FedpaiRowStream* by_output, const void* x, const float* values,
                               const float* bias, void* y, void*) {
  if (const int error = check(*conv, by_output->entry_count)) return error;
  const GatherLaunch launch = forward_launch(*conv, kSms);
  if (conv->dtype == FEDPAI_CUDA_F32) {
    run(forward_args(*conv, *by_output, launch, static_cast<const float*>(x), values, bias, static_cast<float*>(y)), launch);
  } else {
    run(forward_args(*conv, *by_output, launch, static_cast<const BFloat16*>(x), values, bias, static_cast<BFloat16*>(y)), launch);
  }
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_conv2d_input_grad(const FedpaiConv2d* conv, const FedpaiRowStream* by_input, const void* dy,
                                  const float* values, void* dx, void*) {
  if (const int error = check(*conv, by_input->entry_count)) return error;
  const GatherLaunch launch = input_grad_launch(*conv, kSms);
  if (conv->dtype == FEDPAI_CUDA_F32) {
    run(input_grad_args(*conv, *by_input, launch, static_cast<const float*>(dy), values, static_cast<float*>(dx)), launch);
  } else {
    run(input_grad_args(*conv, *by_input, launch, static_cast<const BFloat16*>(dy), values, static_cast<BFloat16*>(dx)), launch);
  }
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_conv2d_weight_grad_workspace(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group, int64_t* bytes) {
  if (const int error = check(*conv, by_group->entry_count)) return error;
  const WeightGradLaunch launch = weight_grad_launch(*conv, by_group->group_count, kSms);
  *bytes = conv->clients * launch.splits * (by_group->entry_count + conv->out_channels) * static_cast<std::int64_t>(sizeof(float));
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_conv2d_weight_grad(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group, const void* x, const void* dy,
                                   float* dvalues, float* dbias, void* workspace, int64_t workspace_bytes, void*) {
  int64_t needed = 0;
  if (const int error = fedpai_cuda_conv2d_weight_grad_workspace(conv, by_group, &needed)) return error;
  if (workspace_bytes < needed) return FEDPAI_CUDA_WORKSPACE;
  if (conv->dtype == FEDPAI_CUDA_F32) {
    weight_grad<float>(*conv, *by_group, x, dy, dvalues, dbias, workspace);
  } else {
    weight_grad<BFloat16>(*conv, *by_group, x, dy, dvalues, dbias, workspace);
  }
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_norm_workspace(const FedpaiNorm* norm, int64_t* bytes) {
  if (const int error = check_norm(*norm)) return error;
  *bytes = workspace_bytes_of(*norm);
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_norm_train(const FedpaiNorm* norm, const void* x, const void* r, const float* weight, const float* bias, double eps,
                           float* running_mean, float* running_var, double momentum, void* y, float* stats, void* workspace,
                           int64_t workspace_bytes, void*) {
  return norm_train(HostDevice{kSms}, *norm, x, r, weight, bias, eps, running_mean, running_var, momentum, y, stats, workspace,
                    workspace_bytes);
}

int fedpai_cuda_norm_eval(const FedpaiNorm* norm, const void* x, const void* r, const float* weight, const float* bias,
                          const float* mean, const float* var, double eps, void* y, float* stats, void*) {
  return norm_eval(HostDevice{kSms}, *norm, x, r, weight, bias, mean, var, eps, y, stats);
}

int fedpai_cuda_norm_apply(const FedpaiNorm* norm, const void* x, const float* weight, const float* bias, const float* stats, void* y,
                           void*) {
  return norm_apply(HostDevice{kSms}, *norm, x, weight, bias, stats, y);
}

int fedpai_cuda_norm_backward(const FedpaiNorm* norm, const void* dy, const void* x, const void* z, const float* weight,
                              const float* bias, const float* stats, int through_statistics, void* dx, void* dr, float* dweight,
                              float* dbias, void* workspace, int64_t workspace_bytes, void*) {
  return norm_backward(HostDevice{kSms}, *norm, dy, x, z, weight, bias, stats, through_statistics != 0, dx, dr, dweight, dbias,
                       workspace, workspace_bytes);
}

int fedpai_cuda_server_step(const FedpaiServerStep* step, const float* old, const float* merged, float* m, float* v, int64_t n,
                            float* out, void*) {
  return run_server_step(*step, old, merged, m, v, n, out);
}

int fedpai_cuda_weighted_mean(const float* vectors, int64_t stride, const double* weights, int64_t clients, int64_t n, int compensated,
                              float* out, void*) {
  run_mean({vectors, weights, out, stride, n, static_cast<std::int32_t>(clients)}, compensated != 0);
  return FEDPAI_CUDA_OK;
}

int64_t fedpai_cuda_segments(int64_t n) { return segments_of(n); }

int fedpai_cuda_find_segments(const int32_t* positions, const int64_t* offsets, int64_t clients, int64_t, int64_t n, int32_t* begins,
                              int32_t* wrong, void*) {
  run_segments({positions, offsets, begins, wrong, static_cast<std::int32_t>(n), static_cast<std::int32_t>(clients),
                static_cast<std::int32_t>(segments_of(n))});
  return FEDPAI_CUDA_OK;
}

int fedpai_cuda_masked_mean(const float* values, const int32_t* positions, const int64_t* offsets, const int32_t* begins,
                            const double* weights, int64_t clients, const float* old, int64_t n, int compensated, float* out, void*) {
  const MaskedMeanArgs args{values, positions, offsets, begins, weights, old, out, static_cast<std::int32_t>(n),
                            static_cast<std::int32_t>(clients)};
  compensated != 0 ? run_masked_mean<true>(args) : run_masked_mean<false>(args);
  return FEDPAI_CUDA_OK;
}

// Not here: that they are declared is enough for the library to load.
int fedpai_cuda_majority(const uint8_t*, int64_t, int64_t, int64_t, int64_t, uint8_t*, void*) { return FEDPAI_CUDA_BAD_ARGUMENT; }
int fedpai_cuda_sgd_step(const FedpaiSgdChunk*, int64_t, const FedpaiSgdOptions*, void*) { return FEDPAI_CUDA_BAD_ARGUMENT; }
int fedpai_cuda_adam_step(const FedpaiAdamChunk*, int64_t, const FedpaiAdamOptions*, void*) { return FEDPAI_CUDA_BAD_ARGUMENT; }

}  // extern "C"
