// SPDX-License-Identifier: Apache-2.0
// The Python module. Pointers travel as integers and are trusted: fedpai_kernels.ops checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fedpai_kernels. Not a public interface: use fedpai_kernels.ops.";
  m.attr("__version__") = FEDPAI_VERSION;
  m.def("isa", [] { return std::string(fedpai::kernels().isa); }, "The instruction set in use.");
  m.def("set_isa", &fedpai::select_isa, pybind11::arg("name"));
  m.def("available_isas", &fedpai::available_isas, "Instruction sets that this machine can run, best last.");
  m.def("compiled_isas", &fedpai::compiled_isas, "Instruction sets compiled into this library, best last.");
  fedpai::bind_aggregate(m);
  fedpai::bind_bf16(m);
  fedpai::bind_plan(m);
  fedpai::bind_conv2d(m);
  fedpai::bind_cuda(m);
  fedpai::bind_group_norm(m);
  fedpai::bind_layout(m);
  fedpai::bind_machine(m);
  fedpai::bind_memory(m);
  fedpai::bind_norm(m);
  fedpai::bind_optim(m);
  fedpai::bind_pool(m);
}
