// SPDX-License-Identifier: Apache-2.0
// Where torch's tensors lie, asked in C: the same questions in Python take several times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/dlpack.h"

namespace fedpai {

class TensorReader {
 public:
  // exchange: the capsule that a tensor type has as __dlpack_c_exchange_api__. types: only objects of exactly these are
  // read, because a subclass may keep its numbers anywhere. Throws std::invalid_argument for a capsule that is none, or
  // of another major version.
  TensorReader(const pybind11::object& exchange, pybind11::tuple types);

  // Describes a tensor whose numbers lie in memory as they are. False: another type, no memory of its own (sparse,
  // meta), or a lazy sign.
  bool read(pybind11::handle tensor, DLTensor& out) const;

 private:
  pybind11::object exchange_;  // keeps api_ alive
  pybind11::tuple types_;
  pybind11::object is_neg_;  // the method, of the first type
  const DLPackExchangeAPI* api_;
};

}  // namespace fedpai
