// SPDX-License-Identifier: Apache-2.0
// Cases for the sparse convolution, and what it should give: seven plain loops in float64, in the order of the formula
//
//   y[n, o, p, q] = bias[o] + sum over c, r, s of  w[o, c, r, s] * x[n, g(o) + c, p*stride - pad + r*dilation, ...]
//
// Arrays here are NCHW and dense; a weight that the mask drops is zero and is skipped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace fedpai::tests {

struct ConvCase {
  std::string name;
  std::int64_t batch, in_channels, height, width;
  std::int64_t out_channels, kernel_h, kernel_w;
  std::int64_t stride_h = 1, stride_w = 1;
  std::int64_t pad_h = 0, pad_w = 0;
  std::int64_t dilation_h = 1, dilation_w = 1;
  // How much more padding the bottom and the right have than the top and the left: 'same' with an even kernel needs 1.
  std::int64_t pad_more_h = 0, pad_more_w = 0;
  std::int64_t groups = 1;
  double density = 0.3;
  // The mask keeps or drops blocks of so many output and input channels, and then loses a share of what is kept.
  std::int64_t block_rows = 1, block_columns = 1;
  double lost = 0;

  std::int64_t group_channels() const { return in_channels / groups; }
  std::int64_t out_height() const {
    return (height + 2 * pad_h + pad_more_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  std::int64_t out_width() const {
    return (width + 2 * pad_w + pad_more_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  std::int64_t x_size() const { return batch * in_channels * height * width; }
  std::int64_t y_size() const { return batch * out_channels * out_height() * out_width(); }
  std::int64_t w_size() const { return out_channels * group_channels() * kernel_h * kernel_w; }
};

// Operands of one case. All are integers of a few bits, so every product and every partial sum is exact in float32, in
// any order, and results are compared for equality.
struct ConvData {
  std::vector<std::uint8_t> mask;  // [out_channels, group_channels, kernel_h, kernel_w]
  std::vector<double> x, w, bias, grad_y;
};

struct ConvResult {
  std::vector<double> y, grad_x, grad_w, grad_bias;
};

ConvData make_data(const ConvCase& c, std::uint64_t seed);
ConvResult reference(const ConvCase& c, const ConvData& data);

// Every geometry that nn.Conv2d has, on sizes that leave remainders everywhere, and batches from 1 to 65.
std::vector<ConvCase> conv_cases();

}  // namespace fedpai::tests
