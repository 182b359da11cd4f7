// SPDX-License-Identifier: Apache-2.0
// Working memory of the calling thread, kept between calls, so that a training step does not allocate.
#pragma once

#include <cstddef>

#include "memory/block_cache.h"

namespace fedpai {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // At least `bytes`, aligned to a page; the former content is lost. In large pages: a packed patch has more small ones
  // than the first-level TLB has entries, and every non-zero reads another.
  void* reserve(std::size_t bytes) {
    if (bytes > block_.size) {
      release();
      block_ = block_cache().allocate(bytes < kLeast ? kLeast : bytes);
    }
    return block_.data;
  }

 private:
  static constexpr std::size_t kLeast = std::size_t{2} << 20;  // one large page

  void release() noexcept {
    if (block_.data != nullptr) block_cache().free(block_);
    block_ = {};
  }

  Block block_;
};

}  // namespace fedpai
