# SPDX-License-Identifier: Apache-2.0
"""Packed values as blocks, in the order in which a direction walks them.

    blocks[e, d, s] = values[origin_e + d * dest_stride_e + s * source_stride_e]      0 in the padding of ragged blocks

Layout: values (nnz,), any dtype; entries (count, 8) int32 (block_plan.py); blocks (count, B, B) of the same dtype,
source channels innermost, overwritten as a whole. Matrix units take both operands with the summed channels innermost
(TF32 on Hopper takes nothing else), which is why each direction has blocks of its own instead of reading the other's
sideways. Bound: memory, 2 * nnz elements; at the sizes that layers have, the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import COLUMNS, DEST_SIZE, DEST_STRIDE, ORIGIN, SOURCE_SIZE, SOURCE_STRIDE

ELEMENTS = 1024
"""Elements of one program; at most all of a block of the smallest side."""


@triton.jit
def pack_kernel(values, blocks, entries, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr):
    """Grid: (count, BLOCK * BLOCK / ELEMENTS)."""
    block = tl.program_id(0)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    dest, source = element // BLOCK, element % BLOCK
    entry = entries + block * COLUMNS
    inside = (dest < tl.load(entry + DEST_SIZE)) & (source < tl.load(entry + SOURCE_SIZE))
    place = tl.load(entry + ORIGIN) + dest * tl.load(entry + DEST_STRIDE) + source * tl.load(entry + SOURCE_STRIDE)
    value = tl.load(values + place, mask=inside, other=0.0)
    tl.store(blocks + block.to(tl.int64) * (BLOCK * BLOCK) + element, value)
