// SPDX-License-Identifier: Apache-2.0
// Optimiser steps for Python: whole lists of torch's tensors, each looked at here and stepped where the kernels can.
//
// Unlike the other bindings these check what they are given: a parameter is taken if it, its gradient and its state are
// dense float32 or float64 tensors in main memory, of one type, shape and strides, and share no byte with another of the
// list that is written. The numbers of the parameters that are not taken are returned; nothing of theirs was touched.
#include "cpu/optim/optim.h"

#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/tensor_reader.h"

namespace py = pybind11;

namespace fedpai {
namespace {

constexpr int kMaxRank = 16;

bool is_float_on_cpu(const DLTensor& t) {
  return t.device.device_type == kDLCPU && t.dtype.code == kDLFloat && t.dtype.lanes == 1 &&
         (t.dtype.bits == 32 || t.dtype.bits == 64);
}

std::int64_t count_of(const DLTensor& t) {
  std::int64_t count = 1;
  for (int d = 0; d < t.ndim; ++d) count *= t.shape[d];
  return count;
}

std::uintptr_t address_of(const DLTensor& t) { return reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset; }

// From its first byte to its last.
Extent extent_of(const DLTensor& t) {
  if (count_of(t) == 0) return {0, 0};  // the sum below would be negative
  std::int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
  return {address_of(t), address_of(t) + static_cast<std::uintptr_t>(last + 1) * (t.dtype.bits / 8)};
}

// Whether the elements lie side by side, in whatever order of the dimensions.
bool is_dense(const DLTensor& t) {
  if (t.ndim > kMaxRank) return false;
  std::array<std::pair<std::int64_t, std::int64_t>, kMaxRank> by_stride;  // stride, size
  int used = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 1) continue;
    int at = used++;
    for (; at > 0 && by_stride[static_cast<std::size_t>(at - 1)].first > t.strides[d]; --at) {
      by_stride[static_cast<std::size_t>(at)] = by_stride[static_cast<std::size_t>(at - 1)];
    }
    by_stride[static_cast<std::size_t>(at)] = {t.strides[d], t.shape[d]};
  }
  std::int64_t expected = 1;
  for (int i = 0; i < used; ++i) {
    if (by_stride[static_cast<std::size_t>(i)].first != expected) return false;
    expected *= by_stride[static_cast<std::size_t>(i)].second;
  }
  return true;
}

// Whether t can be walked along with p.
bool lies_like(const DLTensor& t, const DLTensor& p) {
  if (!is_float_on_cpu(t) || t.dtype.bits != p.dtype.bits || t.ndim != p.ndim) return false;
  for (int d = 0; d < p.ndim; ++d) {
    if (t.shape[d] != p.shape[d] || (p.shape[d] != 1 && t.strides[d] != p.strides[d])) return false;
  }
  return t.data != nullptr || count_of(p) == 0;
}

template <class T>
T* at(const DLTensor& t) {
  return reinterpret_cast<T*>(address_of(t));
}

using Numbers = std::vector<std::size_t>;  // of parameters, in the order of the lists

// The parameters of one call, looked at.
class Survey {
 public:
  // lists: parameters, gradients, then one list for each kind of state; all of one length. steps: one-element tensors
  // that count, or an empty list.
  Survey(const TensorReader& reader, const std::vector<py::list>& lists, const py::list& steps)
      : kinds_(lists.size()), tensors_(lists[0].size() * kinds_), steps_(steps.size()) {
    std::vector<Extent> written, read;
    for (std::size_t i = 0; i < lists[0].size(); ++i) {
      DLTensor* const own = &tensors_[i * kinds_];
      const bool on_cpu = reader.read(lists[0][i], own[0]) && own[0].device.device_type == kDLCPU;
      bool fits = on_cpu && is_float_on_cpu(own[0]) && is_dense(own[0]);
      for (std::size_t k = 1; fits && k < kinds_; ++k) {
        fits = reader.read(lists[k][i], own[k]) && lies_like(own[k], own[0]);
      }
      if (fits && !steps_.empty()) {
        fits = reader.read(steps[i], steps_[i]) && is_float_on_cpu(steps_[i]) && count_of(steps_[i]) == 1;
      }
      (fits ? taken_ : left_).push_back(i);
      if (fits) {
        for (std::size_t k = 0; k < kinds_; ++k) (k == 1 ? read : written).push_back(extent_of(own[k]));
        if (!steps_.empty()) written.push_back(extent_of(steps_[i]));
      } else if (on_cpu) {
        read.push_back(extent_of(own[0]));  // stepped by torch later: nothing of the others may lie in it
      }
    }
    if (!disjoint(std::move(written), read)) {
      taken_.clear();
      left_.resize(lists[0].size());
      std::iota(left_.begin(), left_.end(), std::size_t{0});
    }
  }

  const Numbers& left() const { return left_; }

  // Those of element type T that are taken.
  template <class T>
  Numbers taken() const {
    Numbers found;
    for (const std::size_t i : taken_) {
      if (tensor(i, 0).dtype.bits == 8 * sizeof(T)) found.push_back(i);
    }
    return found;
  }

  // Tensor of list `kind` of a parameter.
  const DLTensor& tensor(std::size_t number, std::size_t kind) const { return tensors_[number * kinds_ + kind]; }

  // Counts one step of a parameter, and tells the new count.
  double count_step(std::size_t number) const {
    const DLTensor& step = steps_[number];
    if (step.dtype.bits == 32) return static_cast<double>(*at<float>(step) += 1.0f);
    return *at<double>(step) += 1.0;
  }

 private:
  std::size_t kinds_;
  std::vector<DLTensor> tensors_, steps_;
  Numbers taken_, left_;
};

template <class T>
std::vector<SgdChunk<T>> sgd_chunks(const Survey& survey, bool has_momentum, const std::vector<bool>& first) {
  std::vector<SgdChunk<T>> chunks;
  for (const std::size_t i : survey.taken<T>()) {
    const DLTensor& p = survey.tensor(i, 0);
    chunks.push_back({at<T>(p), at<const T>(survey.tensor(i, 1)), has_momentum ? at<T>(survey.tensor(i, 2)) : nullptr,
                      count_of(p), has_momentum && first[i]});
  }
  return chunks;
}

template <class T>
std::vector<AdamChunk<T>> adam_chunks(const Survey& survey, bool amsgrad) {
  std::vector<AdamChunk<T>> chunks;
  for (const std::size_t i : survey.taken<T>()) {
    const DLTensor& p = survey.tensor(i, 0);
    chunks.push_back({at<T>(p), at<const T>(survey.tensor(i, 1)), at<T>(survey.tensor(i, 2)),
                      at<T>(survey.tensor(i, 3)), amsgrad ? at<T>(survey.tensor(i, 4)) : nullptr, count_of(p),
                      survey.count_step(i)});
  }
  return chunks;
}

Numbers sgd(const TensorReader& reader, const py::list& params, const py::list& grads, const py::list& buffers,
            const std::vector<bool>& first, double lr, double momentum, double dampening, double weight_decay,
            bool nesterov, bool maximize, int threads) {
  const bool has_momentum = momentum != 0.0;
  std::vector<py::list> lists{params, grads};
  if (has_momentum) lists.push_back(buffers);
  const Survey survey(reader, lists, py::list());
  const auto f32 = sgd_chunks<float>(survey, has_momentum, first);
  const auto f64 = sgd_chunks<double>(survey, has_momentum, first);
  const SgdOptions options{lr, momentum, dampening, weight_decay, nesterov, maximize};
  {
    const py::gil_scoped_release release;
    sgd_step(f32, options, threads);
    sgd_step(f64, options, threads);
  }
  return survey.left();
}

Numbers adam(const TensorReader& reader, const py::list& params, const py::list& grads, const py::list& exp_avgs,
             const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs, const py::list& steps, double lr,
             double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad, bool maximize,
             int threads) {
  std::vector<py::list> lists{params, grads, exp_avgs, exp_avg_sqs};
  if (amsgrad) lists.push_back(max_exp_avg_sqs);
  const Survey survey(reader, lists, steps);
  const auto f32 = adam_chunks<float>(survey, amsgrad);
  const auto f64 = adam_chunks<double>(survey, amsgrad);
  const AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, maximize};
  {
    const py::gil_scoped_release release;
    adam_step(f32, options, threads);
    adam_step(f64, options, threads);
  }
  return survey.left();
}

}  // namespace

void bind_optim(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<const py::object&, py::tuple>(), py::arg("exchange"), py::arg("types"));
  m.def("sgd_step", &sgd, py::arg("reader"), py::arg("params"), py::arg("grads"), py::arg("buffers"), py::arg("first"),
        py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("threads"));
  m.def("adam_step", &adam, py::arg("reader"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled"), py::arg("amsgrad"),
        py::arg("maximize"), py::arg("threads"));
}

}  // namespace fedpai
