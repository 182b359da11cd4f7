// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/vec_avx512.h"

#include "cpu/targets/table-inl.h"
