// SPDX-License-Identifier: Apache-2.0
#include "cpu/layout/layout.h"

#include "bindings/bind.h"

namespace py = pybind11;

namespace {

template <class T>
void transposed(std::uintptr_t source, std::int64_t rows, std::int64_t columns, std::uintptr_t dest, int threads) {
  const py::gil_scoped_release release;
  fedpai::transpose(reinterpret_cast<const T*>(source), rows, columns, reinterpret_cast<T*>(dest), threads);
}

}  // namespace

void fedpai::bind_layout(py::module_& m) {
  m.def("transpose_f32", &transposed<float>);
  m.def("transpose_f64", &transposed<double>);
}
