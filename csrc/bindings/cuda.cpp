// SPDX-License-Identifier: Apache-2.0
// Index streams of a plan for the CUDA kernels, as bytes for the device. The kernels themselves are in a library of their
// own, which Python loads (fedpai_kernels/cuda/library.py); this is there with CUDA and without.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "cpu/conv2d/schedule_cache.h"
#include "cuda/conv2d/streams.h"
#include <pybind11/stl.h>

namespace py = pybind11;

namespace fedpai {
namespace {

// stride, padding in front, dilation; vertical, horizontal
using SpreadArray = std::array<std::int64_t, 6>;

// Entries hold distances in pixels as 32-bit numbers, and a grid has at most 65535 passes.
cuda::Spread spread_of(const CompiledPlan& plan, const SpreadArray& s) {
  constexpr std::int64_t limit = std::int64_t{1} << 29;
  const WeightShape& shape = plan.plan.shape();
  const bool fits = std::all_of(s.begin(), s.end(), [](std::int64_t v) { return v >= 0 && v < limit; }) &&
                    (shape.kernel_h - 1) * s[4] + s[2] < limit && (shape.kernel_w - 1) * s[5] + s[3] < limit &&
                    s[0] > 0 && s[1] > 0 && s[0] * s[1] < 65536;
  if (!fits) {
    throw std::invalid_argument("stride, padding, dilation: the CUDA kernels take distances below 2^29 pixels and "
                                "fewer than 65536 strides, vertical times horizontal");
  }
  const auto narrow = [](std::int64_t i) { return static_cast<std::int32_t>(i); };
  return {narrow(s[0]), narrow(s[1]), narrow(s[2]), narrow(s[3]), narrow(s[4]), narrow(s[5])};
}

template <class T>
void append(std::string& bytes, const std::vector<T>& values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Entries, then where rows begin, then their order.
py::bytes row_bytes(const cuda::RowStream& stream) {
  std::string bytes;
  append(bytes, stream.entries);
  append(bytes, stream.row_begin);
  append(bytes, stream.row_order);
  return bytes;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_forward_stream", [](const CompiledPlan& plan, const SpreadArray& s) {
    return row_bytes(cuda::forward_stream(plan.plan, spread_of(plan, s)));
  }, py::arg("plan"), py::arg("spread"));
  m.def("cuda_input_grad_stream", [](const CompiledPlan& plan, const SpreadArray& s) {
    return row_bytes(cuda::input_grad_stream(plan.plan, spread_of(plan, s)));
  }, py::arg("plan"), py::arg("spread"));
  m.def("cuda_weight_grad_stream", [](const CompiledPlan& plan, const SpreadArray& s) {
    const cuda::GroupStream stream = cuda::weight_grad_stream(plan.plan, spread_of(plan, s));
    std::string bytes;
    append(bytes, stream.entries);
    append(bytes, stream.groups);
    return py::bytes(bytes);
  }, py::arg("plan"), py::arg("spread"));
}

}  // namespace fedpai
