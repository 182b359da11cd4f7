// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace fedpai {

void bind_aggregate(pybind11::module_& m);
void bind_bf16(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_group_norm(pybind11::module_& m);
void bind_layout(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_pool(pybind11::module_& m);

}  // namespace fedpai
