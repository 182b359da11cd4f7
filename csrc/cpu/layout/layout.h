// SPDX-License-Identifier: Apache-2.0
// Changes between batch-first and batch-last storage: transposes of the matrix of images and everything else.
#pragma once

#include <cstdint>

namespace fedpai {

// dest[c, r] = source[r, c] of a matrix of `rows` rows without gaps; the dest has `columns` rows without gaps.
template <class T>
void transpose(const T* source, std::int64_t rows, std::int64_t columns, T* dest, int threads);

}  // namespace fedpai
