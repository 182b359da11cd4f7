// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/vec_neon.h"

#include "cpu/targets/table-inl.h"
