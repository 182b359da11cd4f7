// SPDX-License-Identifier: Apache-2.0
// What may follow a norm in the same pass.
#pragma once

namespace fedpai {

// The order is known to fedpai_kernels/ops/activation.py. Those before kSilu are piecewise linear: their gradient can be
// read from their result.
enum ActivationKind : int { kNone, kRelu, kRelu6, kLeakyRelu, kSilu, kGelu, kGeluTanh, kActivationKinds };
constexpr int kPiecewiseKinds = kSilu;

struct Activation {
  ActivationKind kind = kNone;
  double slope = 0.0;  // of a leaky ReLU below zero, not negative

  bool is_smooth() const { return kind >= kPiecewiseKinds; }
};

}  // namespace fedpai
