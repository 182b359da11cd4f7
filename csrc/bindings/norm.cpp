// SPDX-License-Identifier: Apache-2.0
// Batch norm for Python: addresses as integers, 0 for an absent tensor. fedpai_kernels/ops/norm.py checks the tensors.
#include "cpu/norm/norm.h"

#include <cmath>
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

Activation chosen(int kind, double slope) { return {static_cast<ActivationKind>(kind), slope}; }

template <class T>
void train(std::int64_t channels, std::int64_t row, Address x, Address residual, Address weight, Address bias,
           double eps, int activation, double slope, Address y, Address mean, Address invstd, Address var,
           int threads) {
  batch_norm_train<T>({channels, row}, at<const T>(x), at<const T>(residual), at<const T>(weight), at<const T>(bias),
                      eps, chosen(activation, slope), at<T>(y), at<T>(mean), at<T>(invstd), at<T>(var), threads);
}

template <class T>
void eval(std::int64_t channels, std::int64_t row, Address x, Address residual, Address weight, Address bias,
          Address mean, Address var, double eps, int activation, double slope, Address y, Address invstd, int threads) {
  batch_norm_eval<T>({channels, row}, at<const T>(x), at<const T>(residual), at<const T>(weight), at<const T>(bias),
                     at<const T>(mean), at<const T>(var), eps, chosen(activation, slope), at<T>(y), at<T>(invstd),
                     threads);
}

template <class T>
NormKept<T> kept_at(Address address, bool rounded) {
  if (rounded) return {nullptr, at<const Bf16>(address)};
  return {at<const T>(address), nullptr};
}

template <class T>
void backward(std::int64_t channels, std::int64_t row, Address dy, Address x, Address z, bool rounded, Address weight,
              Address bias, Address mean, Address invstd, bool through_statistics, int activation, double slope,
              Address dx, Address dresidual, Address dweight, Address dbias, int threads) {
  batch_norm_backward<T>({channels, row}, at<const T>(dy), kept_at<T>(x, rounded), kept_at<T>(z, rounded),
                         at<const T>(weight), at<const T>(bias), at<const T>(mean), at<const T>(invstd),
                         through_statistics, chosen(activation, slope), at<T>(dx), at<T>(dresidual), at<T>(dweight),
                         at<T>(dbias), threads);
}

// running += momentum * (batch - running), [channels] each; rounded as by torch's lerp.
template <class T>
void update_running(std::int64_t channels, double momentum, Address batch, Address running) {
  const T* const from = at<const T>(batch);
  T* const to = at<T>(running);
  const T weight = static_cast<T>(momentum);
  for (std::int64_t c = 0; c < channels; ++c) {
    const T difference = from[c] - to[c];
    to[c] = std::abs(weight) < T(0.5) ? std::fma(weight, difference, to[c]) : std::fma(weight - T(1), difference, from[c]);
  }
}

void round_kept(std::int64_t channels, std::int64_t row, Address x, Address weight, Address bias, Address mean,
                Address invstd, int activation, double slope, Address y, int threads) {
  round_for_backward({channels, row}, at<const float>(x), at<const float>(weight), at<const float>(bias),
                     at<const float>(mean), at<const float>(invstd), chosen(activation, slope), at<Bf16>(y), threads);
}

template <class T>
void bind(py::module_& m, const char* train_name, const char* eval_name, const char* backward_name,
          const char* running_name) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def(train_name, &train<T>, py::arg("channels"), py::arg("row"), py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("activation"), py::arg("slope"), py::arg("y"),
        py::arg("mean"), py::arg("invstd"), py::arg("var"), py::arg("threads"), release);
  m.def(eval_name, &eval<T>, py::arg("channels"), py::arg("row"), py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("eps"), py::arg("activation"),
        py::arg("slope"), py::arg("y"), py::arg("invstd"), py::arg("threads"), release);
  m.def(backward_name, &backward<T>, py::arg("channels"), py::arg("row"), py::arg("dy"), py::arg("x"), py::arg("z"),
        py::arg("rounded"), py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("invstd"),
        py::arg("through_statistics"), py::arg("activation"), py::arg("slope"), py::arg("dx"), py::arg("dresidual"),
        py::arg("dweight"), py::arg("dbias"), py::arg("threads"), release);
  m.def(running_name, &update_running<T>, py::arg("channels"), py::arg("momentum"), py::arg("batch"), py::arg("running"));
}

}  // namespace

void bind_norm(py::module_& m) {
  bind<float>(m, "batch_norm_train_f32", "batch_norm_eval_f32", "batch_norm_backward_f32",
              "update_running_f32");
  bind<double>(m, "batch_norm_train_f64", "batch_norm_eval_f64", "batch_norm_backward_f64",
               "update_running_f64");
  m.def("round_for_backward", &round_kept, py::arg("channels"), py::arg("row"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("mean"), py::arg("invstd"), py::arg("activation"), py::arg("slope"), py::arg("y"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace fedpai
