# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolution as an implicit matrix product, forward and input gradient: one kernel on two lists.

    destination[p, d] = bias[d] + sum over blocks e of d's row, source channels s of e: source[q_e(p), s] * W_e[d, s]

    forward          destination y, source x,   q = p * stride - pad + tap * dilation
    input gradient   destination dx, source dy, q = (p + pad - tap * dilation) / stride where that is whole

p and q are (image, row, column); source pixels outside the image are 0. Each program writes PIXELS destination pixels
of one block of B channels: an accumulator of PIXELS x B float32, and per step a product of (PIXELS x DEPTH) pixels
with (DEPTH x B) weights. Rows without blocks write bias or zero. The output is overwritten.

Layout: source and destination are (N, C, H, W) of any strides; pixels are counted with the batch innermost, so
batch-last storage is read in runs of the batch at every tap, stride and dilation, and channels-last storage in runs
of DEPTH channels. blocks: (count, B, B), in the order of the list, source channels innermost (pack.py). begin, dest,
entries: see block_plan.py. float32, float16 or bfloat16, accumulated in float32.

Pixels are the rows of the product because Hopper's matrix instruction has 64 rows and columns in steps of 8: blocks of
16 output channels fill it. Per step and element of the accumulator, PIXELS * DEPTH + DEPTH * B elements are loaded for
PIXELS * DEPTH * B multiply-adds. Bound: for B = 16 what the second-level cache delivers, 1 / 16 source element for each
multiply-add; for B = 128 the matrix units.

Time on a GPU: not measured yet (docs/triton.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import COLUMNS, SOURCE_FIRST, SOURCE_SIZE, TAP


@triton.jit
def locate(position, batch, columns):
    """Position in an image as (image, row, column), the batch innermost."""
    pixel = position // batch
    return position % batch, pixel // columns, pixel % columns


# Integers of which the compiler would make no better code if it knew them to be 1 or divisible by 16.
_PLAIN = (
    "rows", "tiles", "dest_h", "dest_w", "source_h", "source_w", "pad_h", "pad_w",
    "dilation_h", "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN)
def walk_kernel(
    source, blocks, bias, destination, begin, dest, entries,
    rows, tiles, batch, dest_h, dest_w, source_h, source_w, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    source_n, source_c, source_y, source_x, dest_n, dest_c, dest_y, dest_x,
    INPUT_GRAD: tl.constexpr,
    PHASES_H: tl.constexpr,  # that each row of the list is divided into
    PHASES_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # no block is ragged
    PRECISION: tl.constexpr,  # of float32 products: "ieee", "tf32" or "tf32x3"
    OFFSET: tl.constexpr,  # tl.int32, or tl.int64 where a tensor is larger
    WIDEN: tl.constexpr,  # the interpreter multiplies the bits of bfloat16, not the numbers
):  # fmt: skip
    """Grid: rows * phases * tiles; `tiles`: of PIXELS pixels, of one phase."""
    # ---- locate: neighbouring programs write the same pixels, and find their source in the cache
    program = tl.program_id(0)
    row = program % rows
    phase = (program // rows) // tiles
    channel_first = tl.load(dest + 2 * row)
    channels = tl.load(dest + 2 * row + 1)
    columns = (dest_w + PHASES_W - 1) // PHASES_W
    position = ((program // rows) % tiles) * PIXELS + tl.arange(0, PIXELS)
    image, y, x = locate(position, batch, columns)
    if PHASES_H * PHASES_W > 1:
        y = y * PHASES_H + (phase // PHASES_W + PHASES_H - pad_h % PHASES_H) % PHASES_H
        x = x * PHASES_W + (phase % PHASES_W + PHASES_W - pad_w % PHASES_W) % PHASES_W
    written = (y < dest_h) & (x < dest_w)  # the last phases of an image, and the last tile, are not full
    if INPUT_GRAD:
        base_y, base_x = (y + pad_h) // stride_h, (x + pad_w) // stride_w
        residue_y, residue_x = (y + pad_h) % stride_h, (x + pad_w) % stride_w
    else:
        base_y, base_x = y * stride_h - pad_h, x * stride_w - pad_w
    source_image = source + image.to(OFFSET) * source_n

    # ---- main loop: one slice of DEPTH source channels of one block
    SLICES: tl.constexpr = BLOCK // DEPTH
    side = tl.arange(0, BLOCK)
    deep = tl.arange(0, DEPTH)
    list_row = (row * PHASES_H * PHASES_W) + phase
    first, last = tl.load(begin + list_row), tl.load(begin + list_row + 1)
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for step in range(first * SLICES, last * SLICES):
        block = step // SLICES
        channel = (step % SLICES) * DEPTH + deep
        entry = entries + block * COLUMNS
        tap = tl.load(entry + TAP)
        reach_y, reach_x = (tap // kernel_w) * dilation_h, (tap % kernel_w) * dilation_w
        if INPUT_GRAD:
            # Equal residues make this the whole number (y + pad - tap * dilation) / stride.
            source_row, source_column = base_y - reach_y // stride_h, base_x - reach_x // stride_w
        else:
            source_row, source_column = base_y + reach_y, base_x + reach_x
        read = written & (source_row >= 0) & (source_row < source_h) & (source_column >= 0) & (source_column < source_w)
        if INPUT_GRAD and PHASES_H * PHASES_W == 1:
            read = read & (residue_y == reach_y % stride_h) & (residue_x == reach_x % stride_w)
        pixel = source_image + source_row.to(OFFSET) * source_y + source_column.to(OFFSET) * source_x
        source_first = tl.load(entry + SOURCE_FIRST)
        if WHOLE:
            # Without these two the loads of channels-last storage would be of one element each.
            source_first = tl.multiple_of(source_first, BLOCK)
            loaded = read[:, None]
        else:
            loaded = read[:, None] & (channel < tl.load(entry + SOURCE_SIZE))[None, :]
        source_channel = (source_first + channel).to(OFFSET) * source_c
        pixels = tl.load(pixel[:, None] + source_channel[None, :], mask=loaded, other=0.0)
        weight_block = blocks + block.to(tl.int64) * (BLOCK * BLOCK)
        weights = tl.load(weight_block + side[None, :] * BLOCK + channel[:, None])
        if WIDEN:
            pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(pixels, weights, sums, input_precision=PRECISION)

    # ---- write
    if HAS_BIAS:
        sums += tl.load(bias + channel_first + side, mask=side < channels, other=0.0).to(tl.float32)[None, :]
    pixel = image.to(OFFSET) * dest_n + y.to(OFFSET) * dest_y + x.to(OFFSET) * dest_x
    channel = (channel_first + side).to(OFFSET) * dest_c
    tl.store(
        destination + pixel[:, None] + channel[None, :],
        sums.to(destination.dtype.element_ty),
        mask=written[:, None] & (side < channels)[None, :],
    )
