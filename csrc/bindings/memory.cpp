// SPDX-License-Identifier: Apache-2.0
// Tensors in memory of the block cache, handed over as DLPack capsules.
#include <pybind11/stl.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <cstdlib>  // defines __GLIBC__

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings/bind.h"
#include "bindings/dlpack.h"
#include "memory/block_cache.h"

namespace py = pybind11;

namespace {

using Extents = std::vector<std::int64_t>;

// What a capsule points to, and what it points to in turn. Lives as long as the tensor.
struct Loan {
  fedpai::DLManagedTensor managed{};
  fedpai::Block block;
  Extents shape;
  Extents strides;
};

// Called by the tensor's last owner, on any thread, with or without the GIL, even after the interpreter has ended.
void give_back(fedpai::DLManagedTensor* managed) {
  const std::unique_ptr<Loan> loan(static_cast<Loan*>(managed->manager_ctx));
  fedpai::block_cache().free(loan->block);
}

// A capsule that became a tensor has been renamed, and the tensor owns the memory.
void drop_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* const managed = static_cast<fedpai::DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

// Bytes from the first element to behind the last one.
std::size_t span(const Extents& shape, const Extents& strides, std::int64_t item_bytes) {
  if (shape.size() != strides.size()) throw std::invalid_argument("empty_strided: strides: one per dimension expected");
  std::int64_t elements = 1;
  bool overflow = false;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] < 1 || strides[d] < 0) {
      throw std::invalid_argument("empty_strided: sizes above 0 and strides of at least 0 expected, got size " +
                                  std::to_string(shape[d]) + " with stride " + std::to_string(strides[d]));
    }
    std::int64_t reach = 0;
    overflow |= __builtin_mul_overflow(shape[d] - 1, strides[d], &reach);
    overflow |= __builtin_add_overflow(elements, reach, &elements);
  }
  std::int64_t bytes = 0;
  overflow |= __builtin_mul_overflow(elements, item_bytes, &bytes);
  if (overflow) throw std::invalid_argument("empty_strided: shape: more bytes than an address can count");
  return static_cast<std::size_t>(bytes);
}

// Gives the pages that free() has kept back to the system, where the C library can.
void trim_heap() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

py::capsule empty_strided(Extents shape, Extents strides, std::uint8_t code, std::uint8_t bits) {
  const std::size_t bytes = span(shape, strides, bits / 8);
  auto loan = std::make_unique<Loan>();
  loan->shape = std::move(shape);
  loan->strides = std::move(strides);
  loan->managed.dl_tensor.device = {fedpai::kDLCPU, 0};
  loan->managed.dl_tensor.dtype = {code, bits, 1};
  loan->managed.dl_tensor.ndim = static_cast<std::int32_t>(loan->shape.size());
  loan->managed.dl_tensor.shape = loan->shape.data();
  loan->managed.dl_tensor.strides = loan->strides.data();
  loan->managed.manager_ctx = loan.get();
  loan->managed.deleter = give_back;
  try {
    loan->block = fedpai::block_cache().allocate(bytes);
  } catch (const std::bad_alloc&) {
    PyErr_Format(PyExc_MemoryError, "empty_strided: no memory for a tensor of %zu bytes", bytes);
    throw py::error_already_set();
  }
  loan->managed.dl_tensor.data = loan->block.data;
  PyObject* const capsule = PyCapsule_New(&loan->managed, "dltensor", drop_capsule);
  if (capsule == nullptr) {
    fedpai::block_cache().free(loan->block);
    throw py::error_already_set();
  }
  loan.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace

void fedpai::bind_memory(py::module_& m) {
  m.def("empty_strided", &empty_strided, py::arg("shape"), py::arg("strides"), py::arg("code"), py::arg("bits"));
  m.def("set_memory_slack", [](double slack) { fedpai::block_cache().set_slack(slack); }, py::arg("slack"));
  m.def("trim_heap", &trim_heap, py::call_guard<py::gil_scoped_release>());
  m.def(
      "empty_cache", [] { fedpai::block_cache().empty(); }, py::call_guard<py::gil_scoped_release>());
  m.def("memory_stats", [] {
    const fedpai::BlockCacheStats stats = fedpai::block_cache().stats();
    return std::make_tuple(stats.live_bytes, stats.cached_bytes, stats.peak_live_bytes, stats.hits, stats.misses);
  });
}
