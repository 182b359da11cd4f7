// SPDX-License-Identifier: Apache-2.0
// What a call of batch norm consists of: checked sizes, how rows are cut, and which kernels run after one another.
//
// Device is what runs kernels: launches on a stream (norm.cu), or plain loops on the CPU (csrc/tests/cuda_host_norm.h), so
// that tests run everything here as well.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/fedpai_cuda.h"
#include "cuda/norm/norm.cuh"

namespace fedpai::cuda {

constexpr int kMostRowWarps = 16;  // of a thread block that walks a whole row
constexpr int kPieceWarps = 8;     // of one that walks a piece of a row

// Rows are walked whole, both times by one thread block in one launch, where they are short, or where there are as many of them
// as half of the SMs, which can draw nearly all that the memory gives. Else they are cut into pieces, for one launch
// after the other.
struct NormCut {
  std::int32_t blocks;  // of a row
  bool whole_rows;
  int row_warps;
  std::int32_t piece, pieces;  // blocks of a piece, pieces of a row
};

inline NormCut cut_rows(std::int64_t channels, std::int64_t row, int sms) {
  constexpr std::int32_t short_row = 8, longest_piece = 4 * kPieceWarps;
  NormCut cut{};
  cut.blocks = static_cast<std::int32_t>(blocks_of_row(row));
  cut.whole_rows = cut.blocks <= short_row || 2 * channels >= sms;
  cut.row_warps = std::clamp<int>(cut.blocks, 1, kMostRowWarps);
  const auto pieces = [&cut] { return (cut.blocks + cut.piece - 1) / cut.piece; };
  cut.piece = longest_piece;
  while (cut.piece > kPieceWarps && channels * pieces() < 4 * std::int64_t{sms}) cut.piece /= 2;
  cut.pieces = pieces();
  return cut;
}

// Whether there are such kernels, and every index that they form is exact.
inline int check_norm(const FedpaiNorm& n) {
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  if (n.dtype != FEDPAI_CUDA_F32 && n.dtype != FEDPAI_CUDA_BF16) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (n.activation < 0 || n.activation >= kActivationKinds || !(n.slope >= 0.0)) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (n.channels < 0 || n.row < 1) return FEDPAI_CUDA_BAD_ARGUMENT;
  // Thread blocks of a launch are counted in 31 bits; none has fewer than one block of a row.
  const bool fits = n.channels < limit && blocks_of_row(n.row) < limit && n.channels * blocks_of_row(n.row) < limit;
  return fits ? FEDPAI_CUDA_OK : FEDPAI_CUDA_TOO_LARGE;
}

inline std::int64_t workspace_bytes_of(const FedpaiNorm& n) {
  return n.channels * blocks_of_row(n.row) * static_cast<std::int64_t>(sizeof(BlockSums));
}

inline int check_workspace(const FedpaiNorm& n, const void* workspace, std::int64_t bytes) {
  if (bytes < workspace_bytes_of(n)) return FEDPAI_CUDA_WORKSPACE;
  return reinterpret_cast<std::uintptr_t>(workspace) % alignof(BlockSums) == 0 ? FEDPAI_CUDA_OK : FEDPAI_CUDA_MISALIGNED;
}

// Whether elements can be moved by fours: all rows begin at a multiple of that. Null pointers are.
template <class T, class... Pointers>
bool by_fours(std::int64_t row, Pointers... pointers) {
  return row % 4 == 0 && ((reinterpret_cast<std::uintptr_t>(pointers) % (4 * sizeof(T)) == 0) && ...);
}

template <class T>
NormForwardArgs<T> forward_args(const FedpaiNorm& n, const void* x, const void* r, const float* weight, const float* bias,
                                float* stats, void* y) {
  NormForwardArgs<T> a{};
  a.x = static_cast<const T*>(x), a.r = static_cast<const T*>(r), a.y = static_cast<T*>(y);
  a.weight = weight, a.bias = bias, a.stats = stats;
  a.channels = n.channels, a.row = n.row, a.blocks = static_cast<std::int32_t>(blocks_of_row(n.row));
  a.kind = static_cast<int>(n.activation), a.slope = static_cast<float>(n.slope);
  return a;
}

template <int V, class T, class Device>
int run_forward(const Device& device, const NormForwardArgs<T>& a, const NormCut& cut) {
  if (a.source == Statistics::kOfBatch) {
    if (cut.whole_rows) return device.template normalise_rows<V>(a, cut);
    if (const int error = device.template moments<V>(a, cut)) return error;
  }
  return a.y != nullptr ? device.template normalise<V>(a, cut) : device.finish(a);
}

// By float32 or BFloat16: body(static_cast<T*>(nullptr)).
template <class F>
int with_type(std::int64_t dtype, const F& body) {
  return dtype == FEDPAI_CUDA_F32 ? body(static_cast<float*>(nullptr)) : body(static_cast<BFloat16*>(nullptr));
}

template <class T, class Device>
int forward(const Device& device, const FedpaiNorm& norm, const NormForwardArgs<T>& a) {
  int sms = 0;
  if (const int error = device.count_sms(&sms)) return error;
  const NormCut cut = cut_rows(norm.channels, norm.row, sms);
  return by_fours<T>(norm.row, a.x, a.r, a.y) ? run_forward<4>(device, a, cut) : run_forward<1>(device, a, cut);
}

template <int V, class T, class Device>
int run_backward(const Device& device, const NormBackwardArgs<T>& a, const NormCut& cut) {
  if (cut.whole_rows) return device.template differentiate_rows<V>(a, cut);
  if (const int error = device.template gradients<V>(a, cut)) return error;
  if (a.has_second_look()) return device.template pull<V>(a, cut);
  return a.wants_sums ? device.finish(a) : FEDPAI_CUDA_OK;
}

template <class T, class Device>
int backward(const Device& device, const FedpaiNorm& norm, const NormBackwardArgs<T>& a) {
  int sms = 0;
  if (const int error = device.count_sms(&sms)) return error;
  const NormCut cut = cut_rows(norm.channels, norm.row, sms);
  return by_fours<T>(norm.row, a.dy, a.x, a.z, a.dx, a.dr) ? run_backward<4>(device, a, cut) : run_backward<1>(device, a, cut);
}

// ---- the calls of fedpai_cuda.h ---------------------------------------------------------------------------------

template <class Device>
int norm_train(const Device& device, const FedpaiNorm& norm, const void* x, const void* r, const float* weight, const float* bias,
               double eps, float* running_mean, float* running_var, double momentum, void* y, float* stats, void* workspace,
               std::int64_t workspace_bytes) {
  if (const int error = check_norm(norm)) return error;
  if (const int error = check_workspace(norm, workspace, workspace_bytes)) return error;
  if (norm.channels == 0) return FEDPAI_CUDA_OK;
  return with_type(norm.dtype, [&](auto* type) {
    auto a = forward_args<std::remove_pointer_t<decltype(type)>>(norm, x, r, weight, bias, stats, y);
    a.source = Statistics::kOfBatch, a.eps = eps, a.partial = static_cast<BlockSums*>(workspace);
    a.running_mean = running_mean, a.running_var = running_var, a.momentum = momentum;
    return forward(device, norm, a);
  });
}

template <class Device>
int norm_eval(const Device& device, const FedpaiNorm& norm, const void* x, const void* r, const float* weight, const float* bias,
              const float* mean, const float* var, double eps, void* y, float* stats) {
  if (const int error = check_norm(norm)) return error;
  if (norm.channels == 0) return FEDPAI_CUDA_OK;
  return with_type(norm.dtype, [&](auto* type) {
    auto a = forward_args<std::remove_pointer_t<decltype(type)>>(norm, x, r, weight, bias, stats, y);
    a.source = Statistics::kGiven, a.eps = eps, a.given_mean = mean, a.given_var = var;
    return forward(device, norm, a);
  });
}

template <class Device>
int norm_apply(const Device& device, const FedpaiNorm& norm, const void* x, const float* weight, const float* bias, const float* stats,
               void* y) {
  if (const int error = check_norm(norm)) return error;
  if (norm.channels == 0) return FEDPAI_CUDA_OK;
  return with_type(norm.dtype, [&](auto* type) {
    // Read alone, where they were kept.
    auto a = forward_args<std::remove_pointer_t<decltype(type)>>(norm, x, nullptr, weight, bias, const_cast<float*>(stats), y);
    a.source = Statistics::kKept;
    return forward(device, norm, a);
  });
}

template <class Device>
int norm_backward(const Device& device, const FedpaiNorm& norm, const void* dy, const void* x, const void* z, const float* weight,
                  const float* bias, const float* stats, bool through_statistics, void* dx, void* dr, float* dweight, float* dbias,
                  void* workspace, std::int64_t workspace_bytes) {
  if (const int error = check_norm(norm)) return error;
  if ((dweight == nullptr) != (dbias == nullptr) || (dr != nullptr && z == nullptr)) return FEDPAI_CUDA_BAD_ARGUMENT;
  if (const int error = check_workspace(norm, workspace, workspace_bytes)) return error;
  if (norm.channels == 0 || (dx == nullptr && dr == nullptr && dweight == nullptr)) return FEDPAI_CUDA_OK;
  return with_type(norm.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    NormBackwardArgs<T> a{};
    a.dy = static_cast<const T*>(dy), a.x = static_cast<const T*>(x), a.z = static_cast<const T*>(z);
    a.dx = static_cast<T*>(dx), a.dr = static_cast<T*>(dr);
    a.weight = weight, a.bias = bias, a.stats = stats, a.dweight = dweight, a.dbias = dbias;
    a.partial = static_cast<BlockSums*>(workspace);
    a.channels = norm.channels, a.row = norm.row, a.blocks = static_cast<std::int32_t>(blocks_of_row(norm.row));
    a.kind = static_cast<int>(norm.activation), a.slope = static_cast<float>(norm.slope);
    a.through_statistics = through_statistics;
    a.wants_sums = dweight != nullptr || (dx != nullptr && through_statistics);
    if (through_statistics && dx != nullptr && (z != nullptr || a.kind >= kPiecewiseKinds)) a.kept = dr != nullptr ? a.dr : a.dx;
    return backward(device, norm, a);
  });
}

}  // namespace fedpai::cuda
