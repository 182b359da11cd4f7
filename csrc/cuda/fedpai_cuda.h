/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of libfedpai_cuda.so.
 *
 * Every launcher takes device pointers and a stream (a cudaStream_t, null for the default one), puts its kernels on that
 * stream of the current device, and returns at once: 0, a cudaError_t above 0, or one of the codes below. Launchers
 * allocate nothing, copy nothing from the host and wait for nothing, so a CUDA graph may capture them. Outputs are
 * overwritten unless said otherwise. Sizes are not checked against the memory behind the pointers.
 *
 * fedpai_kernels/cuda/library.py mirrors these structs; FEDPAI_CUDA_INTERFACE counts what a change of them breaks.
 */
#ifndef FEDPAI_CUDA_H
#define FEDPAI_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FEDPAI_CUDA_INTERFACE 3

#if defined(_WIN32)
#define FEDPAI_CUDA_API __declspec(dllexport)
#else
#define FEDPAI_CUDA_API __attribute__((visibility("default")))
#endif

enum { FEDPAI_CUDA_F32 = 0, FEDPAI_CUDA_BF16 = 1 };

enum {
  FEDPAI_CUDA_OK = 0,
  FEDPAI_CUDA_TOO_LARGE = -1,    /* 2^31 elements or more, or a stride beyond what indices hold */
  FEDPAI_CUDA_MISALIGNED = -2,   /* images are read by fours, and do not begin at a multiple of four elements */
  FEDPAI_CUDA_WORKSPACE = -3,    /* the workspace is smaller than asked for */
  FEDPAI_CUDA_BAD_ARGUMENT = -4, /* a dtype, count or rule that there is not */
};

FEDPAI_CUDA_API int fedpai_cuda_interface(void);

/* How many devices there are; 35 (cudaErrorInsufficientDriver) and the like where there is no driver. */
FEDPAI_CUDA_API int fedpai_cuda_device_count(int* count);

/* What a code means, in words; lives for ever. */
FEDPAI_CUDA_API const char* fedpai_cuda_message(int code);

/* ---- convolution: csrc/cuda/conv2d ------------------------------------------------------------------------------ */

typedef struct {
  int64_t clients; /* that share the plan, and one launch; below 65536 */
  int64_t batch, in_channels, in_h, in_w, out_channels, out_h, out_w, stride_h, stride_w;
  int64_t dtype; /* of images; values, bias and their gradients are float32 */
} FedpaiConv2d;

/* RowStream and GroupStream of csrc/cuda/conv2d/streams.h, on the device. Entries: 16 bytes each, aligned to that. */
typedef struct {
  const void* entries;
  const int32_t* row_begin;
  const int32_t* row_order;
  int64_t entry_count;
} FedpaiRowStream;

typedef struct {
  const void* entries;
  const void* groups;
  int64_t entry_count, group_count;
} FedpaiGroupStream;

/* Images are (clients, C, H, W, N) without gaps, values and their gradients (clients, entry_count), bias and its gradient
 * (clients, out_channels). bias may be null. */
FEDPAI_CUDA_API int fedpai_cuda_conv2d_forward(const FedpaiConv2d* conv, const FedpaiRowStream* by_output, const void* x,
                                               const float* values, const float* bias, void* y, void* stream);
FEDPAI_CUDA_API int fedpai_cuda_conv2d_input_grad(const FedpaiConv2d* conv, const FedpaiRowStream* by_input, const void* dy,
                                                  const float* values, void* dx, void* stream);

/* dbias may be null. workspace: so many bytes as the second function says for the current device, aligned to 4. */
FEDPAI_CUDA_API int fedpai_cuda_conv2d_weight_grad(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group, const void* x,
                                                   const void* dy, float* dvalues, float* dbias, void* workspace,
                                                   int64_t workspace_bytes, void* stream);
FEDPAI_CUDA_API int fedpai_cuda_conv2d_weight_grad_workspace(const FedpaiConv2d* conv, const FedpaiGroupStream* by_group,
                                                             int64_t* bytes);

/* ---- batch norm: csrc/cuda/norm --------------------------------------------------------------------------------- */

typedef struct {
  int64_t channels, row; /* elements of a channel, H * W * N of them side by side; at least one */
  int64_t dtype;         /* of activations; parameters, statistics and their gradients are float32 */
  int64_t activation;    /* an ActivationKind of csrc/cpu/norm/activation.h */
  double slope;          /* of a leaky ReLU below zero, not negative */
} FedpaiNorm;

/* Bytes of workspace, aligned to 16, that training and the backward pass need. */
FEDPAI_CUDA_API int fedpai_cuda_norm_workspace(const FedpaiNorm* norm, int64_t* bytes);

/* y = activation(norm(x) + r) with the statistics of x. r: null for none. weight, bias: null for 1 and 0. y: null for the
 * statistics alone. stats: [3][channels], mean, 1 / sqrt(var + eps), unbiased variance. running_mean and running_var: null, or
 * what takes `momentum` parts of mean and variance in. */
FEDPAI_CUDA_API int fedpai_cuda_norm_train(const FedpaiNorm* norm, const void* x, const void* r, const float* weight,
                                           const float* bias, double eps, float* running_mean, float* running_var,
                                           double momentum, void* y, float* stats, void* workspace, int64_t workspace_bytes,
                                           void* stream);

/* The same with given mean and var. stats: [2][channels], without the last. */
FEDPAI_CUDA_API int fedpai_cuda_norm_eval(const FedpaiNorm* norm, const void* x, const void* r, const float* weight,
                                          const float* bias, const float* mean, const float* var, double eps, void* y,
                                          float* stats, void* stream);

/* y = activation(norm(x)) with stats as either of these left them. */
FEDPAI_CUDA_API int fedpai_cuda_norm_apply(const FedpaiNorm* norm, const void* x, const float* weight, const float* bias,
                                           const float* stats, void* y, void* stream);

/* z: null; where there were a residual and an activation, y, or r where the activation is smooth. dx, dr (with z only), dweight
 * and dbias (both or none): null where they are not wanted. dx may be dy. */
FEDPAI_CUDA_API int fedpai_cuda_norm_backward(const FedpaiNorm* norm, const void* dy, const void* x, const void* z,
                                              const float* weight, const float* bias, const float* stats,
                                              int through_statistics, void* dx, void* dr, float* dweight, float* dbias,
                                              void* workspace, int64_t workspace_bytes, void* stream);

/* ---- merging: csrc/cuda/aggregate -------------------------------------------------------------------------------- */

/* vectors: [clients][n], rows `stride` elements apart. weights: on the device. */
FEDPAI_CUDA_API int fedpai_cuda_weighted_mean(const float* vectors, int64_t stride, const double* weights, int64_t clients,
                                              int64_t n, int compensated, float* out, void* stream);

/* How many segments n elements have. */
FEDPAI_CUDA_API int64_t fedpai_cuda_segments(int64_t n);

/* positions: those of all clients, one behind the other; offsets: [clients + 1]; most_values: of one client.
 * begins: [segments + 1][clients]. wrong: [clients], 1 where positions are not ascending without repeats in [0, n). */
FEDPAI_CUDA_API int fedpai_cuda_find_segments(const int32_t* positions, const int64_t* offsets, int64_t clients,
                                              int64_t most_values, int64_t n, int32_t* begins, int32_t* wrong, void* stream);

/* begins: as found for these positions. Where positions are wrong, so is out, but nothing else is read or written.
 * out may be old. */
FEDPAI_CUDA_API int fedpai_cuda_masked_mean(const float* values, const int32_t* positions, const int64_t* offsets,
                                            const int32_t* begins, const double* weights, int64_t clients, const float* old,
                                            int64_t n, int compensated, float* out, void* stream);

/* bitmaps: [clients][bytes], rows `stride` bytes apart. */
FEDPAI_CUDA_API int fedpai_cuda_majority(const uint8_t* bitmaps, int64_t stride, int64_t clients, int64_t threshold,
                                         int64_t bytes, uint8_t* out, void* stream);

/* rule: a ServerStep of csrc/cpu/aggregate/kernels.h. */
typedef struct {
  double lr, beta1, beta2, tau;
  int64_t rule;
} FedpaiServerStep;

/* n elements each; m and v are changed in place, v is null where the rule has none. out may be old or merged. */
FEDPAI_CUDA_API int fedpai_cuda_server_step(const FedpaiServerStep* step, const float* old, const float* merged, float* m,
                                            float* v, int64_t n, float* out, void* stream);

/* ---- optimisers: csrc/cuda/optim --------------------------------------------------------------------------------- */

/* Lists and options lie on the host, what they point to on the device; chunks are disjoint. One launch serves 480. */
typedef struct {
  float* p;
  const float* g;
  float* buffer; /* momentum; null without */
  int64_t count;
  int64_t first; /* 1: the buffer holds nothing yet, and is filled */
} FedpaiSgdChunk;

typedef struct {
  double lr, momentum, dampening, weight_decay;
  int64_t nesterov, maximize;
} FedpaiSgdOptions;

typedef struct {
  float* p;
  const float* g;
  float* m;
  float* v;
  float* v_max;             /* amsgrad; null without */
  const float* device_step; /* number of this step, on the device; null: step */
  int64_t count;
} FedpaiAdamChunk;

typedef struct {
  double lr, beta1, beta2, eps, weight_decay;
  double step; /* 1 the first time */
  int64_t decoupled, maximize;
} FedpaiAdamOptions;

FEDPAI_CUDA_API int fedpai_cuda_sgd_step(const FedpaiSgdChunk* chunks, int64_t count, const FedpaiSgdOptions* options, void* stream);
FEDPAI_CUDA_API int fedpai_cuda_adam_step(const FedpaiAdamChunk* chunks, int64_t count, const FedpaiAdamOptions* options, void* stream);

#ifdef __cplusplus
}
#endif

#endif
