// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/vec_scalar.h"

#include "cpu/targets/table-inl.h"
