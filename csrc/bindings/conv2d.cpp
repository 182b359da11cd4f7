// SPDX-License-Identifier: Apache-2.0
#include "cpu/conv2d/conv2d.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/bind.h"
#include "cpu/norm/norm.h"
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

using fedpai::CompiledPlan;
using fedpai::Conv2dGeometry;
using fedpai::Images;

// batch, in_h, in_w, out_h, out_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w
using GeometryArray = std::array<std::int64_t, 11>;
// Element strides: batch, channel, row, column.
using Strides = std::array<std::int64_t, 4>;

Conv2dGeometry geometry(const GeometryArray& g) {
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]};
}

template <class T>
Images<T> images(std::uintptr_t data, const Strides& s) {
  return {reinterpret_cast<T*>(data), s[0], s[1], s[2], s[3]};
}

// mean, invstd, weight, bias (the last two may be 0), the kind of the activation, the bits of its slope; no elements: no norm.
using NormArray = std::vector<std::uintptr_t>;

// The norm that x goes through, with the memory behind it.
template <class T>
class SourceNorm {
 public:
  SourceNorm(const NormArray& norm, const CompiledPlan& plan) {
    if (norm.empty()) return;
    const auto at = [&](std::size_t i) { return reinterpret_cast<const T*>(norm.at(i)); };
    channels_ = fedpai::norm_affines<T>(plan.plan.shape().in_channels(), at(2), at(3), at(0), at(1));
    double slope;
    const std::uint64_t bits = norm.at(5);
    std::memcpy(&slope, &bits, sizeof(slope));
    map_ = {channels_.data(), {static_cast<fedpai::ActivationKind>(norm.at(4)), slope}};
  }
  const fedpai::NormMap<T>* get() const { return channels_.empty() ? nullptr : &map_; }

 private:
  std::vector<fedpai::NormAffine<T>> channels_;
  fedpai::NormMap<T> map_{};
};

template <class T>
void forward(const CompiledPlan& plan, const GeometryArray& g, std::uintptr_t x, const Strides& x_strides,
             const NormArray& norm, std::uintptr_t values, std::uintptr_t bias, std::uintptr_t y, const Strides& y_strides, int threads) {
  const py::gil_scoped_release release;
  fedpai::conv2d_forward<T>(plan, geometry(g), images<const T>(x, x_strides), SourceNorm<T>(norm, plan).get(),
                            reinterpret_cast<const T*>(values), reinterpret_cast<const T*>(bias),
                            images<T>(y, y_strides), threads);
}

template <class T>
void input_grad(const CompiledPlan& plan, const GeometryArray& g, std::uintptr_t dy, const Strides& dy_strides,
                std::uintptr_t values, std::uintptr_t dx, const Strides& dx_strides, int threads) {
  const py::gil_scoped_release release;
  fedpai::conv2d_input_grad<T>(plan, geometry(g), images<const T>(dy, dy_strides), reinterpret_cast<const T*>(values),
                               images<T>(dx, dx_strides), threads);
}

template <class T>
void weight_grad(const CompiledPlan& plan, const GeometryArray& g, std::uintptr_t x, const Strides& x_strides,
                 const NormArray& norm, std::uintptr_t dy, const Strides& dy_strides, std::uintptr_t values_grad,
                 std::uintptr_t bias_grad, int threads) {
  const py::gil_scoped_release release;
  fedpai::conv2d_weight_grad<T>(plan, geometry(g), images<const T>(x, x_strides), SourceNorm<T>(norm, plan).get(),
                                images<const T>(dy, dy_strides), reinterpret_cast<T*>(values_grad), reinterpret_cast<T*>(bias_grad), threads);
}

template <class T>
void backward(const CompiledPlan& plan, const GeometryArray& g, std::uintptr_t x, const Strides& x_strides,
              const NormArray& norm, std::uintptr_t dy, const Strides& dy_strides, std::uintptr_t values, std::uintptr_t dx,
              const Strides& dx_strides, std::uintptr_t values_grad, std::uintptr_t bias_grad, int threads) {
  const py::gil_scoped_release release;
  fedpai::conv2d_backward<T>(plan, geometry(g), images<const T>(x, x_strides), SourceNorm<T>(norm, plan).get(),
                             images<const T>(dy, dy_strides), reinterpret_cast<const T*>(values), images<T>(dx, dx_strides),
                             reinterpret_cast<T*>(values_grad), reinterpret_cast<T*>(bias_grad), threads);
}

template <class T>
void bind_dtype(py::module_& m, const std::string& dtype) {
  m.def(("conv2d_forward_" + dtype).c_str(), &forward<T>);
  m.def(("conv2d_input_grad_" + dtype).c_str(), &input_grad<T>);
  m.def(("conv2d_weight_grad_" + dtype).c_str(), &weight_grad<T>);
  m.def(("conv2d_backward_" + dtype).c_str(), &backward<T>);
}

// In the order of fedpai::Walk.
constexpr std::array<std::string_view, 3> kWalks{"choose", "tiled", "streamed"};

}  // namespace

void fedpai::bind_conv2d(py::module_& m) {
  bind_dtype<float>(m, "f32");
  bind_dtype<double>(m, "f64");
  m.def("walk", [] { return std::string(kWalks[static_cast<std::size_t>(fedpai::walk_in_force())]); },
        "How convolutions walk their entries: choose (by the cost models), tiled or streamed.");
  m.def("force_walk", [](const std::string& name) {
    const auto found = std::find(kWalks.begin(), kWalks.end(), name);
    if (found == kWalks.end()) throw std::invalid_argument("walk: expected choose, tiled or streamed, got " + name);
    fedpai::force_walk(static_cast<fedpai::Walk>(found - kWalks.begin()));
  }, py::arg("name"), "For tests and experiments: one walk for the whole process, wherever it is possible.");
}
