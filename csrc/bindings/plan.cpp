// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <memory>

#include "bindings/bind.h"
#include "cpu/conv2d/schedule_cache.h"

namespace py = pybind11;

void fedpai::bind_plan(py::module_& m) {
  py::class_<fedpai::CompiledPlan, std::shared_ptr<fedpai::CompiledPlan>>(m, "CompiledPlan")
      .def(py::init([](std::uintptr_t mask, std::int64_t out_channels, std::int64_t in_channels_per_group,
                       std::int64_t kernel_h, std::int64_t kernel_w, std::int64_t groups) {
             const py::gil_scoped_release release;
             return std::make_shared<fedpai::CompiledPlan>(
                 reinterpret_cast<const std::uint8_t*>(mask),
                 fedpai::WeightShape{out_channels, in_channels_per_group, kernel_h, kernel_w, groups});
           }),
           py::arg("mask"), py::arg("out_channels"), py::arg("in_channels_per_group"), py::arg("kernel_h"),
           py::arg("kernel_w"), py::arg("groups"))
      .def_property_readonly("nnz", [](const fedpai::CompiledPlan& self) { return self.plan.nnz(); })
      .def_property_readonly("shared_weights", [](const fedpai::CompiledPlan& self) {
        return py::make_tuple(self.plan.by_output().groups.shared, self.plan.by_input().groups.shared);
      })
      .def("flat_indices",
           [](const fedpai::CompiledPlan& self, std::uintptr_t out) {
             self.plan.flat_indices(reinterpret_cast<std::int64_t*>(out));
           },
           py::arg("out"));
}
