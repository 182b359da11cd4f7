// SPDX-License-Identifier: Apache-2.0
// Group norm for Python: addresses as integers, 0 for an absent tensor. fedpai_kernels/ops/group_norm.py checks the
// tensors.
#include "cpu/norm/group_norm.h"

#include <cstdint>

#include "bindings/bind.h"

namespace py = pybind11;

namespace fedpai {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void forward(std::int64_t images, std::int64_t channels, std::int64_t pixels, std::int64_t groups, Address x,
             Address weight, Address bias, double eps, bool relu, Address y, Address mean, Address invstd,
             int threads) {
  group_norm_forward<T>({images, channels, pixels, groups}, at<const T>(x), at<const T>(weight), at<const T>(bias),
                        eps, relu, at<T>(y), at<T>(mean), at<T>(invstd), threads);
}

template <class T>
void backward(std::int64_t images, std::int64_t channels, std::int64_t pixels, std::int64_t groups, Address dy,
              Address x, Address weight, Address bias, Address mean, Address invstd, bool relu, Address dx,
              Address dweight, Address dbias, int threads) {
  group_norm_backward<T>({images, channels, pixels, groups}, at<const T>(dy), at<const T>(x), at<const T>(weight),
                         at<const T>(bias), at<const T>(mean), at<const T>(invstd), relu, at<T>(dx), at<T>(dweight),
                         at<T>(dbias), threads);
}

template <class T>
void bind(py::module_& m, const char* forward_name, const char* backward_name) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def(forward_name, &forward<T>, py::arg("images"), py::arg("channels"), py::arg("pixels"), py::arg("groups"),
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("relu"), py::arg("y"),
        py::arg("mean"), py::arg("invstd"), py::arg("threads"), release);
  m.def(backward_name, &backward<T>, py::arg("images"), py::arg("channels"), py::arg("pixels"), py::arg("groups"),
        py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("invstd"),
        py::arg("relu"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("threads"), release);
}

}  // namespace

void bind_group_norm(py::module_& m) {
  bind<float>(m, "group_norm_forward_f32", "group_norm_backward_f32");
  bind<double>(m, "group_norm_forward_f64", "group_norm_backward_f64");
}

}  // namespace fedpai
