# SPDX-License-Identifier: Apache-2.0
"""What all block kernels read: columns of the list of blocks, and settings that hold for a whole process."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of fedpai_kernels.triton.block_plan.Walk.entries. Constants of a kernel must be tl.constexpr.
COLUMNS = tl.constexpr(8)
DEST_FIRST = tl.constexpr(0)
DEST_SIZE = tl.constexpr(1)
SOURCE_FIRST = tl.constexpr(2)
SOURCE_SIZE = tl.constexpr(3)
TAP = tl.constexpr(4)
ORIGIN = tl.constexpr(5)
DEST_STRIDE = tl.constexpr(6)
SOURCE_STRIDE = tl.constexpr(7)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET decides when they are defined, once for a process."""
