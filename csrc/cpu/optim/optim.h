// SPDX-License-Identifier: Apache-2.0
// One optimiser step over all parameters of a group, in one pass that the threads share element by element.
//
// Every element is computed by itself, so the bits depend neither on the number of threads nor on who took what.
#pragma once

#include <cstdint>
#include <vector>

namespace fedpai {

// One parameter: `count` elements side by side, in the same order in all arrays.
template <class T>
struct SgdChunk {
  T* p;
  const T* g;
  T* buffer;  // momentum; null without
  std::int64_t count;
  bool first;  // the buffer holds nothing yet, and is filled
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

template <class T>
struct AdamChunk {
  T* p;
  const T* g;
  T* m;
  T* v;
  T* v_max;  // amsgrad; null without
  std::int64_t count;
  double step;  // of this parameter: 1 the first time
};

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // weight decay as in AdamW
  bool maximize;
};

// The arrays of all chunks must be disjoint (below), except that gradients may overlap one another.
template <class T>
void sgd_step(const std::vector<SgdChunk<T>>& chunks, const SgdOptions& options, int threads);
template <class T>
void adam_step(const std::vector<AdamChunk<T>>& chunks, const AdamOptions& options, int threads);

struct Extent {
  std::uintptr_t begin, end;  // addresses; empty where equal
};

// Whether no byte that is written is written or read by anything else in the lists.
bool disjoint(std::vector<Extent> written, const std::vector<Extent>& read);

}  // namespace fedpai
