// SPDX-License-Identifier: Apache-2.0
// Pooling for Python: addresses as integers. fedpai_kernels/ops/pool.py checks the tensors and computes the sizes.
#include "cpu/pool/pool.h"

#include <array>
#include <cstdint>
#include <string>

#include "bindings/bind.h"
#include <pybind11/stl.h>

namespace py = pybind11;

namespace fedpai {
namespace {

using Address = std::uintptr_t;
using Window = std::array<std::int64_t, 6>;  // in, out, kernel, stride, padding, dilation

PoolShape shape_of(std::int64_t channels, std::int64_t batch, const Window& h, const Window& w) {
  return {channels, batch, {h[0], h[1], h[2], h[3], h[4], h[5]}, {w[0], w[1], w[2], w[3], w[4], w[5]}};
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  const py::call_guard<py::gil_scoped_release> release;
  const py::arg channels("channels"), batch("batch"), rows("rows"), columns("columns"), threads("threads");
  m.def(
      ("max_pool2d_fwd_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, Address x, Address y, Address argmax,
         int t) { max_pool2d_fwd<T>(shape_of(c, n, h, w), at<const T>(x), at<T>(y), at<typename PoolTap<T>::type>(argmax), t); },
      channels, batch, rows, columns, py::arg("x"), py::arg("y"), py::arg("argmax"), threads, release);
  m.def(
      ("max_pool2d_dx_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, Address dy, Address argmax, Address dx,
         int t) {
        max_pool2d_dx<T>(shape_of(c, n, h, w), at<const T>(dy), at<const typename PoolTap<T>::type>(argmax), at<T>(dx), t);
      },
      channels, batch, rows, columns, py::arg("dy"), py::arg("argmax"), py::arg("dx"), threads, release);
  m.def(
      ("avg_pool2d_fwd_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, bool pad, std::int64_t fixed, Address x,
         Address y, int t) { avg_pool2d_fwd<T>(shape_of(c, n, h, w), {pad, fixed}, at<const T>(x), at<T>(y), t); },
      channels, batch, rows, columns, py::arg("count_include_pad"), py::arg("divisor"), py::arg("x"), py::arg("y"),
      threads, release);
  m.def(
      ("avg_pool2d_dx_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, bool pad, std::int64_t fixed, Address dy,
         Address dx, int t) { avg_pool2d_dx<T>(shape_of(c, n, h, w), {pad, fixed}, at<const T>(dy), at<T>(dx), t); },
      channels, batch, rows, columns, py::arg("count_include_pad"), py::arg("divisor"), py::arg("dy"), py::arg("dx"),
      threads, release);
  m.def(
      ("adaptive_avg_pool2d_fwd_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, Address x, Address y, int t) {
        adaptive_avg_pool2d_fwd<T>(shape_of(c, n, h, w), at<const T>(x), at<T>(y), t);
      },
      channels, batch, rows, columns, py::arg("x"), py::arg("y"), threads, release);
  m.def(
      ("adaptive_avg_pool2d_dx_" + dtype).c_str(),
      [](std::int64_t c, std::int64_t n, const Window& h, const Window& w, Address dy, Address dx, int t) {
        adaptive_avg_pool2d_dx<T>(shape_of(c, n, h, w), at<const T>(dy), at<T>(dx), t);
      },
      channels, batch, rows, columns, py::arg("dy"), py::arg("dx"), threads, release);
}

}  // namespace

void bind_pool(py::module_& m) {
  bind<float>(m, "f32");
  bind<double>(m, "f64");
}

}  // namespace fedpai
