// SPDX-License-Identifier: Apache-2.0
// Vectors of one index per non-zero, whose memory comes from the block cache: a plan for a new mask reuses what the old
// one left, instead of faulting in megabytes again. Elements that a constructor or resize() adds are not initialised
// unless a value is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "memory/block_cache.h"

namespace fedpai {

template <class T>
class CacheAllocator {
 public:
  using value_type = T;

  CacheAllocator() = default;
  template <class U>
  CacheAllocator(const CacheAllocator<U>&) {}  // NOLINT: an implicit conversion is what allocators need

  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    if (bytes < kSmall) return static_cast<T*>(::operator new(bytes));
    // The block's true size lies in front of the elements.
    const Block block = block_cache().allocate(bytes + kHeader);
    std::memcpy(block.data, &block.size, sizeof block.size);
    return reinterpret_cast<T*>(static_cast<char*>(block.data) + kHeader);
  }

  void deallocate(T* data, std::size_t count) noexcept {
    if (count * sizeof(T) < kSmall) {
      ::operator delete(data);
      return;
    }
    Block block{reinterpret_cast<char*>(data) - kHeader, 0};
    std::memcpy(&block.size, block.data, sizeof block.size);
    block_cache().free(block);
  }

  template <class U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;
  }
  template <class U, class... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }

  friend bool operator==(const CacheAllocator&, const CacheAllocator&) { return true; }
  friend bool operator!=(const CacheAllocator&, const CacheAllocator&) { return false; }

 private:
  static constexpr std::size_t kSmall = std::size_t{64} << 10;  // bytes; below it, malloc keeps what is freed
  static constexpr std::size_t kHeader = 64;                    // bytes; keeps the elements aligned
};

using IndexVector = std::vector<std::int32_t, CacheAllocator<std::int32_t>>;

}  // namespace fedpai
