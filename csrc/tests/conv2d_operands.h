// SPDX-License-Identifier: Apache-2.0
// The operands of a convolution case as tensors of several layouts, and their comparison with the reference.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "conv2d_reference.h"
#include "cpu/conv2d/conv2d.h"

namespace fedpai::tests {

// How a tensor lies in memory.
enum class Layout {
  kBatchLast,   // C, H, W, N
  kBatchFirst,  // N, C, H, W
  kGaps,        // batch last with unused elements between rows, pixels and channels, and a start off any alignment
};

inline const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::kBatchLast:
      return "batch_last";
    case Layout::kBatchFirst:
      return "batch_first";
    case Layout::kGaps:
      return "gaps";
  }
  return "?";
}

// A tensor of one layout in memory that ends with its last element.
template <class T>
class Tensor {
 public:
  Tensor(Layout layout, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w)
      : n_(n), c_(c), h_(h), w_(w), strides_(strides(layout, n, c, h, w)), start_(layout == Layout::kGaps ? 1 : 0),
        memory_(start_ + 1 + (n - 1) * strides_.batch + (c - 1) * strides_.channel + (h - 1) * strides_.row +
                (w - 1) * strides_.column) {}

  Images<T> images() { return {memory_.data() + start_, strides_.batch, strides_.channel, strides_.row, strides_.column}; }
  Images<const T> images() const {
    return {memory_.data() + start_, strides_.batch, strides_.channel, strides_.row, strides_.column};
  }

  // visit(element, index in NCHW order)
  template <class F>
  void each(F&& visit) {
    std::size_t i = 0;
    for (std::int64_t n = 0; n < n_; ++n)
      for (std::int64_t c = 0; c < c_; ++c)
        for (std::int64_t h = 0; h < h_; ++h)
          for (std::int64_t w = 0; w < w_; ++w)
            visit(memory_[start_ + n * strides_.batch + c * strides_.channel + h * strides_.row + w * strides_.column],
                  i++);
  }
  void set(const std::vector<double>& values) {
    each([&](T& element, std::size_t i) { element = static_cast<T>(values[i]); });
  }
  std::int64_t count() const { return n_ * c_ * h_ * w_; }
  Buffer<T>& memory() { return memory_; }

 private:
  struct Strides {
    std::int64_t batch, channel, row, column;
  };
  static Strides strides(Layout layout, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w) {
    if (layout == Layout::kBatchFirst) return {c * h * w, h * w, w, 1};
    const std::int64_t gap = layout == Layout::kGaps ? 1 : 0;
    const std::int64_t column = n + gap;
    const std::int64_t row = w * column + 3 * gap;
    return {1, h * row + 5 * gap, row, column};
  }

  std::int64_t n_, c_, h_, w_;
  Strides strides_;
  std::int64_t start_;
  Buffer<T> memory_;
};

inline Conv2dGeometry geometry_of(const ConvCase& c) {
  return {c.batch,    c.height, c.width, c.out_height(), c.out_width(), c.stride_h, c.stride_w,
          c.pad_h, c.pad_w,  c.dilation_h, c.dilation_w};
}

inline WeightShape shape_of(const ConvCase& c) {
  return {c.out_channels, c.group_channels(), c.kernel_h, c.kernel_w, c.groups};
}

// The kept elements of a dense weight, in the plan's order.
template <class T>
Buffer<T> packed(const std::vector<double>& dense, const std::vector<std::uint8_t>& mask) {
  Buffer<T> values(std::count(mask.begin(), mask.end(), 1));
  std::int64_t next = 0;
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != 0) values[next++] = static_cast<T>(dense[i]);
  }
  return values;
}

template <class T>
Buffer<T> vector_of(const std::vector<double>& values) {
  Buffer<T> result(static_cast<std::int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) result[static_cast<std::int64_t>(i)] = static_cast<T>(values[i]);
  return result;
}

template <class T>
void expect_equal(const char* what, const Buffer<T>& got, const Buffer<T>& expected) {
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    if (got[i] == expected[i]) continue;
    CHECK(false, std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
                     std::to_string(expected[i]));
    return;
  }
  CHECK(true, "");
}

template <class T>
void expect_equal(const char* what, Tensor<T>& got, const std::vector<double>& expected) {
  std::string message;
  got.each([&](T& element, std::size_t i) {
    if (static_cast<double>(element) != expected[i] && message.empty()) {
      message = std::string(what) + "[" + std::to_string(i) + " in NCHW order] is " + std::to_string(element) +
                ", expected " + std::to_string(expected[i]);
    }
  });
  CHECK(message.empty(), message);
  // Every element was checked above and is far from the fill, so what still holds it are the gaps.
  const auto untouched = std::count(got.memory().begin(), got.memory().end(), T(1e30));
  CHECK(untouched == got.memory().size() - got.count(), std::string(what) + ": something was written between its elements");
}

// One case, completely.
template <class T>
struct Operands {
  Operands(const ConvCase& c, const ConvData& data, Layout layout)
      : x(layout, c.batch, c.in_channels, c.height, c.width),
        grad_y(layout, c.batch, c.out_channels, c.out_height(), c.out_width()),
        y(layout, c.batch, c.out_channels, c.out_height(), c.out_width()),
        grad_x(layout, c.batch, c.in_channels, c.height, c.width),
        joint_grad_x(layout, c.batch, c.in_channels, c.height, c.width),
        values(packed<T>(data.w, data.mask)),
        bias(vector_of<T>(data.bias)),
        grad_values(values.size()),
        grad_bias(c.out_channels),
        joint_grad_values(values.size()),
        joint_grad_bias(c.out_channels) {
    x.set(data.x);
    grad_y.set(data.grad_y);
  }

  void compute(const CompiledPlan& plan, const Conv2dGeometry& geometry, int threads) {
    const Tensor<T>& x_read = x;
    const Tensor<T>& grad_read = grad_y;
    conv2d_forward<T>(plan, geometry, x_read.images(), nullptr, values.data(), bias.data(), y.images(), threads);
    conv2d_input_grad<T>(plan, geometry, grad_read.images(), values.data(), grad_x.images(), threads);
    conv2d_weight_grad<T>(plan, geometry, x_read.images(), nullptr, grad_read.images(), grad_values.data(), grad_bias.data(),
                          threads);
    conv2d_backward<T>(plan, geometry, x_read.images(), nullptr, grad_read.images(), values.data(), joint_grad_x.images(),
                       joint_grad_values.data(), joint_grad_bias.data(), threads);
  }

  Tensor<T> x, grad_y, y, grad_x, joint_grad_x;
  Buffer<T> values, bias, grad_values, grad_bias, joint_grad_values, joint_grad_bias;
};

}  // namespace fedpai::tests
