// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_reader.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fedpai {
namespace {

constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace

TensorReader::TensorReader(const py::object& exchange, py::tuple types)
    : exchange_(exchange), types_(std::move(types)), api_(nullptr) {
  if (PyCapsule_IsValid(exchange.ptr(), kCapsuleName) == 0) {
    throw std::invalid_argument("exchange: expected a capsule '" + std::string(kCapsuleName) + "', got " +
                                py::str(py::type::of(exchange)).cast<std::string>());
  }
  is_neg_ = types_[0].attr("is_neg");
  api_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), kCapsuleName));
  while (api_ != nullptr && api_->major > kDLPackMajor) api_ = api_->previous;
  if (api_ == nullptr || api_->major != kDLPackMajor || api_->dltensor_from_py_object_no_sync == nullptr) {
    throw std::invalid_argument("exchange: expected functions of DLPack " + std::to_string(kDLPackMajor) +
                                " that describe a tensor, got none");
  }
}

bool TensorReader::read(py::handle tensor, DLTensor& out) const {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  const bool known = std::any_of(types_.begin(), types_.end(), [type](py::handle t) { return t.ptr() == type; });
  if (!known) return false;
  if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &out) != 0) {
    PyErr_Clear();
    return false;
  }
  // DLPack has no word for a lazy sign.
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), tensor.ptr()));
  if (!negated) throw py::error_already_set();
  return negated.ptr() == Py_False;
}

}  // namespace fedpai
