// SPDX-License-Identifier: Apache-2.0
// bfloat16 for Python: addresses as integers. fedpai_kernels/ops/stored.py checks the tensors.
#include "cpu/bf16/bf16.h"

#include <cstdint>

#include "bindings/bind.h"

namespace py = pybind11;

namespace fedpai {
namespace {

using Address = std::uintptr_t;

void round(Address x, Address y, std::int64_t n, int threads) {
  round_to_bf16(reinterpret_cast<const float*>(x), reinterpret_cast<Bf16*>(y), n, threads);
}

void widen(Address x, Address y, std::int64_t n, int threads) {
  widen_bf16(reinterpret_cast<const Bf16*>(x), reinterpret_cast<float*>(y), n, threads);
}

}  // namespace

void bind_bf16(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("round_to_bf16", &round, py::arg("x"), py::arg("y"), py::arg("n"), py::arg("threads"), release);
  m.def("widen_bf16", &widen, py::arg("x"), py::arg("y"), py::arg("n"), py::arg("threads"), release);
}

}  // namespace fedpai
