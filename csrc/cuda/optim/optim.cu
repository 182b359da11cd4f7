// SPDX-License-Identifier: Apache-2.0
// Kernels and launchers of the optimisers; see optim.cuh.
#include "cuda/optim/optim.cuh"

#include "cuda/common/launching.h"

namespace fedpai::cuda {
namespace {

using SgdTable = ChunkTable<FedpaiSgdChunk, FedpaiSgdOptions>;
using AdamTable = ChunkTable<FedpaiAdamChunk, FedpaiAdamOptions>;
static_assert(sizeof(SgdTable) <= 32764 && sizeof(AdamTable) <= 32764, "a launch has no room for more arguments");

// body(element) for this thread's elements of a chunk.
template <class Table, class F>
__device__ __forceinline__ void for_elements(const Table& table, std::int32_t chunk, const F& body) {
  const std::int64_t begin = static_cast<std::int64_t>(static_cast<std::int32_t>(blockIdx.x) - table.first_block[chunk]) * kOptimElements;
  const std::int64_t count = table.chunk[chunk].count, end = begin + kOptimElements < count ? begin + kOptimElements : count;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kOptimThreads) body(i);
}

__global__ void __launch_bounds__(kOptimThreads) optim_sgd(const __grid_constant__ SgdTable table) {
  const std::int32_t chunk = chunk_of(table, static_cast<std::int32_t>(blockIdx.x));
  for_elements(table, chunk, [&](std::int64_t i) { sgd_element(table.chunk[chunk], table.options, i); });
}

__global__ void __launch_bounds__(kOptimThreads) optim_adam(const __grid_constant__ AdamTable table) {
  __shared__ AdamCorrections corrections;
  const std::int32_t chunk = chunk_of(table, static_cast<std::int32_t>(blockIdx.x));
  if (threadIdx.x == 0) corrections = adam_corrections(table.chunk[chunk], table.options);
  __syncthreads();
  const AdamCorrections own = corrections;
  for_elements(table, chunk, [&](std::int64_t i) { adam_element(table.chunk[chunk], table.options, own, i); });
}

template <class Table, class Chunk, class Options>
int launch_step(void (*kernel)(const Table), const Chunk* chunks, std::int64_t count, const Options& options, void* stream) {
  if (count < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
  std::int64_t elements = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    if (chunks[c].count < 0) return FEDPAI_CUDA_BAD_ARGUMENT;
    elements += chunks[c].count;
  }
  if (elements / kOptimElements + count > INT32_MAX) return FEDPAI_CUDA_TOO_LARGE;
  while (count > 0) {
    Table table;
    const std::int64_t taken = fill_table(chunks, count, options, table);
    const auto blocks = static_cast<unsigned>(table.first_block[taken]);
    if (blocks > 0) {
      kernel<<<blocks, kOptimThreads, 0, stream_of(stream)>>>(table);
      if (const int error = launched()) return error;
    }
    chunks += taken;
    count -= taken;
  }
  return FEDPAI_CUDA_OK;
}

}  // namespace
}  // namespace fedpai::cuda

using namespace fedpai::cuda;

int fedpai_cuda_sgd_step(const FedpaiSgdChunk* chunks, int64_t count, const FedpaiSgdOptions* options, void* stream) {
  return launch_step(optim_sgd, chunks, count, *options, stream);
}

int fedpai_cuda_adam_step(const FedpaiAdamChunk* chunks, int64_t count, const FedpaiAdamOptions* options, void* stream) {
  return launch_step(optim_adam, chunks, count, *options, stream);
}
