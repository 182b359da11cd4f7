# SPDX-License-Identifier: Apache-2.0
"""Gradient of the blocks of a block-sparse convolution, in two passes, the same bits on every run and device.

    partials[i, e, d, s] = sum over the output pixels p of part i: dy[p, d] * x[p * stride - pad + tap_e * dilation, s]
    dvalues[origin_e + d * dest_stride_e + s * source_stride_e] = sum over i, ascending: partials[i, e, d, s]

The sum runs over batch x height x width, 10^4 to 10^6 terms, into few blocks: one program per block would leave most
of a GPU idle, so the pixels are cut into parts. How many depends on shapes alone, not on the device. Nothing is added
by atomics. An output gradient whose source pixel lies outside the image is not read: 0 * inf does not happen.

Layout: x, dy (N, C, H, W) of any strides, float32, float16 or bfloat16; entries (count, 8) int32 of the forward list
(block_plan.py); partials (parts, count, B, B) float32; dvalues (nnz,), of the dtype of x. All outputs are overwritten.
With the batch innermost both operands lie along the summed pixels, as matrix units want them.

Per block, pixel and B * B multiply-adds 2 B elements are loaded. Bound: for small B the second-level cache, for B = 128
the matrix units. Blocks of one row share dy, and do not share its load: blocks that do are to be tried.

Time on a GPU: not measured yet (docs/triton.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    COLUMNS,
    DEST_FIRST,
    DEST_SIZE,
    DEST_STRIDE,
    ORIGIN,
    SOURCE_FIRST,
    SOURCE_SIZE,
    SOURCE_STRIDE,
    TAP,
)
from .walk import locate

_PLAIN = ("count", "positions", "part", "x_h", "x_w", "pad_h", "pad_w", "dilation_h", "dilation_w")


@triton.jit(do_not_specialize=_PLAIN)
def weight_grad_kernel(
    x, dy, partials, entries,
    count, positions, part, batch, dy_w, x_h, x_w, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    x_n, x_c, x_y, x_x, dy_n, dy_c, dy_y, dy_x,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,  # pixels of one step
    WHOLE: tl.constexpr,  # no block is ragged
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: count * parts. `part`: pixels of a part, a multiple of DEPTH; `positions`: output pixels of all images."""
    program = tl.program_id(0)
    entry = entries + (program % count) * COLUMNS
    first = (program // count) * part
    side = tl.arange(0, BLOCK)
    dest_first, source_first = tl.load(entry + DEST_FIRST), tl.load(entry + SOURCE_FIRST)
    if WHOLE:
        # As in the walk: without these two the loads of channels-last storage would be of one element each.
        dest_first, source_first = tl.multiple_of(dest_first, BLOCK), tl.multiple_of(source_first, BLOCK)
    dest_exists = side < tl.load(entry + DEST_SIZE)
    source_exists = side < tl.load(entry + SOURCE_SIZE)
    dest = dy + (dest_first + side).to(OFFSET) * dy_c
    source = x + (source_first + side).to(OFFSET) * x_c
    tap = tl.load(entry + TAP)
    shift_y = (tap // kernel_w) * dilation_h - pad_h
    shift_x = (tap % kernel_w) * dilation_w - pad_w

    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(first, tl.minimum(first + part, positions), DEPTH):
        position = start + tl.arange(0, DEPTH)
        image, row, column = locate(position, batch, dy_w)
        source_row, source_column = row * stride_h + shift_y, column * stride_w + shift_x
        read = (source_row >= 0) & (source_row < x_h) & (source_column >= 0) & (source_column < x_w)
        read = read & (position < positions)
        dest_pixel = image.to(OFFSET) * dy_n + row.to(OFFSET) * dy_y + column.to(OFFSET) * dy_x
        pixel = image.to(OFFSET) * x_n + source_row.to(OFFSET) * x_y + source_column.to(OFFSET) * x_x
        if WHOLE:
            dest_loaded, source_loaded = read[None, :], read[:, None]
        else:
            dest_loaded = dest_exists[:, None] & read[None, :]
            source_loaded = read[:, None] & source_exists[None, :]
        grads = tl.load(dest[:, None] + dest_pixel[None, :], mask=dest_loaded, other=0.0)
        pixels = tl.load(source[None, :] + pixel[:, None], mask=source_loaded, other=0.0)
        if WIDEN:
            grads, pixels = grads.to(tl.float32), pixels.to(tl.float32)
        sums = tl.dot(grads, pixels, sums, input_precision=PRECISION)

    own = partials + program.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(own + side[:, None] * BLOCK + side[None, :], sums)


@triton.jit(do_not_specialize=("count", "parts"))
def join_kernel(partials, dvalues, entries, count, parts, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr):
    """Grid: (count, BLOCK * BLOCK / ELEMENTS)."""
    block = tl.program_id(0)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    sums = tl.zeros((ELEMENTS,), tl.float32)
    for part in range(parts):
        own = partials + (part * count + block).to(tl.int64) * (BLOCK * BLOCK)
        sums += tl.load(own + element)
    entry = entries + block * COLUMNS
    dest, source = element // BLOCK, element % BLOCK
    inside = (dest < tl.load(entry + DEST_SIZE)) & (source < tl.load(entry + SOURCE_SIZE))
    place = tl.load(entry + ORIGIN) + dest * tl.load(entry + DEST_STRIDE) + source * tl.load(entry + SOURCE_STRIDE)
    tl.store(dvalues + place, sums.to(dvalues.dtype.element_ty), mask=inside)
