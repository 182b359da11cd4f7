// SPDX-License-Identifier: Apache-2.0
// Working memory of the calling thread, kept between calls, so that a training step does not allocate.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace fedpai {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes`, aligned to a page; the former content is lost.
  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const std::size_t rounded = (bytes + kPage - 1) / kPage * kPage;
      data_ = std::aligned_alloc(kPage, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  static constexpr std::size_t kPage = 4096;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fedpai
