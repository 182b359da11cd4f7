// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fedpai_kernels.";
  m.attr("__version__") = FEDPAI_VERSION;
}
