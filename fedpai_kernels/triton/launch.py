# SPDX-License-Identifier: Apache-2.0
"""From tensors to launches: grids, strides and sizes of the block kernels.

Nothing here synchronises or looks at data, so every function may run while a CUDA graph is captured. Memory is taken
from torch for what is returned, for the blocks of the weights and for the partial sums of a weight gradient, which
capture allows; input that is neither batch-last nor channels-last is copied first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import empty_batch_last, is_batch_last, to_batch_last
from ..ops.geometry import Geometry, Pair
from .block_plan import BlockPlan, Tables, Walk
from .runtime import current
from .tiles import parts, walk_tile, weight_grad_tile

_LARGEST_OFFSET = 2**31 - 1  # that 32 bits hold
_MOST_PIXELS = 2**30  # sums of two such numbers fit 32 bits


class Walked(NamedTuple):
    """The two images of a convolution and what lies between them, for one direction of the walk."""

    geometry: Geometry
    kernel: Pair
    input_grad: bool


def stored(t: Tensor) -> Tensor:
    """`t` itself where it is batch-last or channels-last, else a batch-last copy.

    Results are stored as what they are computed from. A matrix (rows, features, 1, 1) is channels-last when its rows
    are.
    """
    if is_batch_last(t) or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return to_batch_last(t)


def empty_stored_like(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, of that shape, and of the storage that :func:`stored` gives `t`."""
    if not is_batch_last(t) and t.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    return empty_batch_last(shape, dtype=t.dtype, device=t.device)


def run_walk(
    source: Tensor, values: Tensor, bias: Tensor | None, walk: Walk, block: int, precision: str, shape: tuple[int, ...],
    walked: Walked,
) -> Tensor:  # fmt: skip
    """Forward or input gradient: the destination, of that shape. Arguments are not checked, but for sizes."""
    import triton

    from .kernels.walk import walk_kernel

    source = stored(source)
    destination = empty_stored_like(source, shape)
    if destination.numel() == 0:
        return destination
    phases_h, phases_w = walk.phases
    batch, _, height, width = shape
    positions = batch * -(-height // phases_h) * -(-width // phases_w)
    _check_sizes(walked.geometry, walked.kernel, source, destination)
    tile = walk_tile(block, source.dtype, positions)
    tiles = triton.cdiv(positions, tile.pixels)
    grid = (walk.rows * phases_h * phases_w * tiles,)
    with current(source.device):
        tables = walk.on(source.device)
        blocks = _packed(values, tables, block)
        walk_kernel[grid](
            source, blocks, blocks if bias is None else bias.contiguous(), destination, *tables,
            walk.rows, tiles, batch, height, width, source.shape[2], source.shape[3], walked.kernel[1],
            *walked.geometry.stride, *walked.geometry.pad_front, *walked.geometry.dilation,
            *source.stride(), *destination.stride(),
            INPUT_GRAD=walked.input_grad, PHASES_H=phases_h, PHASES_W=phases_w, HAS_BIAS=bias is not None,
            BLOCK=block, PIXELS=tile.pixels, DEPTH=tile.depth, WHOLE=walk.whole, PRECISION=precision,
            OFFSET=_offset(source, destination), WIDEN=_widen(source),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return destination


def run_weight_grad(
    x: Tensor, dy: Tensor, plan: BlockPlan, nnz: int, precision: str, geometry: Geometry, kernel: Pair
) -> Tensor:
    """Gradient of the packed values: (nnz,), of the dtype of x. Arguments are not checked, but for sizes."""
    import triton

    from .kernels.weight_grad import join_kernel, weight_grad_kernel

    x, dy = stored(x), stored(dy)
    dvalues = torch.empty(nnz, dtype=x.dtype, device=x.device)
    positions = dy.shape[0] * dy.shape[2] * dy.shape[3]
    if positions == 0:
        return dvalues.zero_()
    _check_sizes(geometry, kernel, x, dy)
    block, count = plan.block, plan.count
    tile = weight_grad_tile(block, x.dtype)
    number, size = parts(count, positions, tile.depth)
    elements = min(block * block, 1024)
    with current(x.device):
        entries = plan.forward.on(x.device).entries
        partials = torch.empty((number, count, block, block), dtype=torch.float32, device=x.device)
        weight_grad_kernel[(count * number,)](
            x, dy, partials, entries, count, positions, size, dy.shape[0], dy.shape[3], x.shape[2], x.shape[3],
            kernel[1], *geometry.stride, *geometry.pad_front, *geometry.dilation, *x.stride(), *dy.stride(),
            BLOCK=block, DEPTH=tile.depth, WHOLE=plan.whole, PRECISION=precision, OFFSET=_offset(x, dy),
            WIDEN=_widen(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        join_kernel[(count, triton.cdiv(block * block, elements))](
            partials, dvalues, entries, count, number, BLOCK=block, ELEMENTS=elements
        )
    return dvalues


def _packed(values: Tensor, tables: Tables, block: int) -> Tensor:
    """The values as blocks in the order of a list: (count, block, block)."""
    from .kernels.pack import ELEMENTS, pack_kernel

    count = len(tables.entries)
    blocks = values.new_empty((count, block, block))
    elements = min(block * block, ELEMENTS)
    pack_kernel[(count, block * block // elements)](
        values.contiguous(), blocks, tables.entries, BLOCK=block, ELEMENTS=elements
    )
    return blocks


def _offset(*tensors: Tensor) -> Any:
    """The type that offsets into these tensors are computed in."""
    import triton.language as tl

    largest = max(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int32 if largest <= _LARGEST_OFFSET else tl.int64


def _widen(t: Tensor) -> bool:
    from .kernels.table import INTERPRETED

    return INTERPRETED and t.dtype == torch.bfloat16


def _check_sizes(geometry: Geometry, kernel: Pair, *images: Tensor) -> None:
    """Pixels are counted in 32 bits.

    Raises:
        ValueError: more pixels in all images, or steps beyond them.
    """
    most = max(t.shape[0] * t.shape[2] * t.shape[3] for t in images)
    side = max(max(t.shape[2:]) for t in images)
    reach = side * max(geometry.stride) + max(geometry.pad_front)
    spread = max(d * k for d, k in zip(geometry.dilation, kernel, strict=True))
    if max(most, reach, spread) > _MOST_PIXELS:
        raise ValueError(
            f"x: {most} pixels in all images, with {geometry} and a kernel of {kernel[0]} x {kernel[1]}, exceed the "
            "2^30 that the kernels count to"
        )
