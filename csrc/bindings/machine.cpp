// SPDX-License-Identifier: Apache-2.0
// The machine's rates for Python; python/fedpai/bench/machine.py makes a roofline of them.
#include "cpu/machine/machine.h"

#include "bindings/bind.h"
#include <pybind11/stl.h>

namespace py = pybind11;

void fedpai::bind_machine(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("fma_rate", &fma_rate, py::arg("bytes"), py::arg("threads"), py::arg("seconds"), release,
        "Multiply-adds per second with one operand from a buffer of so many bytes per thread; 0: from registers.");
  m.def("stream_rate", &stream_rate, py::arg("bytes"), py::arg("threads"), py::arg("seconds"), release,
        "Bytes per second of dest = factor * source in so many bytes, with the reading of dest before its writing.");
  m.def("loads_per_fma", [] {
    const LoadsPerFma loads = loads_per_fma();
    return std::pair(loads.forward, loads.weight_grad);
  }, "Vector loads per vector multiply-add of the convolutions: forward and input gradient, weight gradient.");
}
