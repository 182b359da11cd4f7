// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides to step a run of parameters. See kernels-inl.h for the formulas.
#pragma once

#include <cstdint>

namespace fedpai {

template <class T>
struct SgdFactors {
  T sign;  // of the gradient: -1 to maximise, else 1
  T weight_decay;
  T momentum;
  T undamped;  // 1 - dampening
  T minus_lr;
  bool decays;  // flags of the factors as they are given, before rounding
  bool has_momentum;
  bool first;  // the buffer holds nothing yet
  bool nesterov;
};

enum class AdamDecay { kNone, kGradient, kParameter };  // kParameter: decoupled, as in AdamW

template <class T>
struct AdamFactors {
  T sign;
  AdamDecay decay;
  T weight_decay;  // what the decay adds to the gradient, of the parameter
  T keep;          // what a decoupled decay leaves of the parameter
  // m += pull * (g - m) for a small pull; a large one is counted from g: m = g + (pull - 1) * (g - m).
  T pull;
  bool pull_is_large;
  T beta2;
  T one_minus_beta2;
  T correction;  // sqrt(1 - beta2^step)
  T eps;
  T minus_step;  // -lr / (1 - beta1^step)
};

// Pointers need no alignment. Every array has n elements and is read and written in place, once; g is only read.
template <class T>
struct OptimKernels {
  // buffer is not read where factors.first, and not touched without momentum.
  void (*sgd)(T* p, const T* g, T* buffer, std::int64_t n, const SgdFactors<T>& factors);
  // v_max: null without amsgrad.
  void (*adam)(T* p, const T* g, T* m, T* v, T* v_max, std::int64_t n, const AdamFactors<T>& factors);
};

}  // namespace fedpai
