// SPDX-License-Identifier: Apache-2.0
// The little that these tests need of a test framework: suites that register themselves, checks that go on after a
// failure and say where they were, exactly sized buffers, and a random generator that is the same everywhere.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fedpai::tests {

using SuiteBody = void (*)();

// A suite of this file: `FEDPAI_SUITE(conv2d) { ... }`. It runs once per instruction set.
struct Suite {
  const char* name;
  SuiteBody body;
};
std::vector<Suite>& suites();
struct RegisterSuite {
  RegisterSuite(const char* name, SuiteBody body) { suites().push_back({name, body}); }
};
#define FEDPAI_SUITE(name)                                                          \
  static void suite_##name();                                                       \
  static const ::fedpai::tests::RegisterSuite register_##name(#name, suite_##name); \
  static void suite_##name()

// Names the case that the following checks belong to, in the failure messages.
void begin_case(const std::string& name);
void fail(const char* file, int line, const std::string& message);
void count_check();

#define CHECK(condition, ...)                                                                    \
  do {                                                                                           \
    ::fedpai::tests::count_check();                                                              \
    if (!(condition)) {                                                                          \
      ::fedpai::tests::fail(__FILE__, __LINE__, #condition + std::string("  ") + (__VA_ARGS__)); \
    }                                                                                            \
  } while (false)

// Memory of exactly `size` elements that ends at the end of its heap block, so that a sanitizer sees the first element
// read or written behind it. Filled with a value that spoils any sum it gets into.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : size_(size), data_(static_cast<T*>(allocated(bytes()))) {
    if (data_ == nullptr) throw std::bad_alloc();
    for (std::int64_t i = 0; i < size_; ++i) data_[i] = filler();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  // Large ones at the start of a cache line, where the package's tensors lie; malloc's lie 16 bytes behind one.
  static void* allocated(std::size_t bytes) {
    constexpr std::size_t kLarge = 1 << 20, kLine = 64;
    if (bytes < kLarge) return std::malloc(bytes);
    void* data = nullptr;
    return posix_memalign(&data, kLine, bytes) == 0 ? data : nullptr;
  }
  static T filler() {
    if constexpr (std::is_floating_point_v<T>) return T(1e30);
    return std::numeric_limits<T>::max();
  }
  std::size_t bytes() const { return size_ > 0 ? static_cast<std::size_t>(size_) * sizeof(T) : 1; }

  std::int64_t size_;
  T* data_;
};

// SplitMix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
  // An integer in [-bound, bound].
  int integer(int bound) { return static_cast<int>(next() % static_cast<std::uint64_t>(2 * bound + 1)) - bound; }

 private:
  std::uint64_t state_;
};

}  // namespace fedpai::tests
