// SPDX-License-Identifier: Apache-2.0
// Merging for Python: addresses as integers. fedpai_kernels/aggregate.py checks the arrays.
#include "cpu/aggregate/aggregate.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings/bind.h"

namespace py = pybind11;

namespace fedpai {
namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

template <class T>
std::vector<const T*> pointers(const Addresses& addresses) {
  std::vector<const T*> found;
  found.reserve(addresses.size());
  for (const Address address : addresses) found.push_back(reinterpret_cast<const T*>(address));
  return found;
}

float* floats(Address address) { return reinterpret_cast<float*>(address); }

void mean(const Addresses& vectors, const std::vector<double>& weights, std::int64_t n, bool compensated, Address out,
          int threads) {
  weighted_mean(pointers<float>(vectors), weights, n, compensated, floats(out), threads);
}

std::int64_t mean_of_masked(const Addresses& vectors, const Addresses& positions,
                            const std::vector<std::int64_t>& counts, const std::vector<double>& weights, Address old,
                            std::int64_t n, bool compensated, Address out, int threads) {
  std::vector<MaskedVector> masked;
  for (std::size_t k = 0; k < vectors.size(); ++k) {
    masked.push_back({floats(vectors[k]), reinterpret_cast<const std::int32_t*>(positions[k]), counts[k], weights[k]});
  }
  return masked_mean(masked, floats(old), n, compensated, floats(out), threads);
}

void vote(const Addresses& bitmaps, std::int64_t threshold, std::int64_t bytes, Address out, int threads) {
  majority(pointers<std::uint8_t>(bitmaps), threshold, bytes, reinterpret_cast<std::uint8_t*>(out), threads);
}

void step(int rule, Address old, Address merged, Address m, Address v, std::int64_t n, double lr, double beta1,
          double beta2, double tau, Address out, int threads) {
  const auto narrow = [](double factor) { return static_cast<float>(factor); };
  const ServerStepFactors factors{narrow(lr),    narrow(beta1),       narrow(1.0 - beta1),
                                  narrow(beta2), narrow(1.0 - beta2), narrow(tau)};
  server_step(static_cast<ServerStep>(rule), floats(old), floats(merged), floats(m), floats(v), n, factors, floats(out), threads);
}

}  // namespace

void bind_aggregate(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("weighted_mean", &mean, py::arg("vectors"), py::arg("weights"), py::arg("n"), py::arg("compensated"),
        py::arg("out"), py::arg("threads"), release);
  m.def("masked_mean", &mean_of_masked, py::arg("vectors"), py::arg("positions"), py::arg("counts"),
        py::arg("weights"), py::arg("old"), py::arg("n"), py::arg("compensated"), py::arg("out"), py::arg("threads"),
        release);
  m.def("majority", &vote, py::arg("bitmaps"), py::arg("threshold"), py::arg("bytes"), py::arg("out"),
        py::arg("threads"), release);
  m.def("server_step", &step, py::arg("rule"), py::arg("old"), py::arg("merged"), py::arg("m"), py::arg("v"),
        py::arg("n"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("tau"), py::arg("out"),
        py::arg("threads"), release);
}

}  // namespace fedpai
