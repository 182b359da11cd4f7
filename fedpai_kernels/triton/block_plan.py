# SPDX-License-Identifier: Apache-2.0
"""A BlockPlan: the surviving blocks of one mask, as the lists that the Triton kernels walk.

A block is B output x B input channels at one tap of the kernel, B one of 16, 32, 64, 128. Blocks are cut inside each
group of a convolution, from its first channel on; at the ragged edge they are smaller, and the kernels pad them. Lists
are built once per mask and block size, shared by all plans of the mask, and kept on every device that asked for them.

One list per direction, each sorted by the channel block that the direction writes:

    forward           rows are blocks of output channels; inside a row by input channels, then by tap
    input gradient    rows are blocks of input channels; inside a row by phase, output channels, tap
    weight gradient   the blocks themselves, in the order of the forward list

A *phase* is a residue of (pixel + padding) modulo the stride: an input pixel meets only the taps whose dilated offset
has the same residue, so at stride 2 a list without phases would multiply three zeros of four.

**Packed values are blocks already, seen through strides.** A mask of whole blocks gives all output channels of a block
row the same number of weights, and all kernels between two channel blocks the same taps. So in row-major order of the
mask the weight of output channel r and input channel c of a block lies at

    origin + r * (weights of an output channel in this block row) + c * (taps that survive between these two blocks)

and three numbers per block replace an index per weight, for packing and for unpacking.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.geometry import Pair
from ..plan import Plan
from ..structure import Block, Structure, Unstructured, check, grouped

BLOCKS = (16, 32, 64, 128)
"""Sides of blocks that there are kernels for. Triton's matrix product takes no side below 16."""

# Columns of Walk.entries; the kernels name them in kernels/table.py.
DEST_FIRST, DEST_SIZE, SOURCE_FIRST, SOURCE_SIZE, TAP, ORIGIN, DEST_STRIDE, SOURCE_STRIDE = range(8)

# Above so many phases (strides beyond 4 x 4) most would be empty: the list then has one phase, and the kernel tests
# residues itself.
_MAX_PHASES = 16


class Tables(NamedTuple):
    """The lists of a direction as int32 tensors of one device. A row's channels are those of `dest`."""

    begin: Tensor  # (rows * phases + 1): where each row and phase begins in `entries`
    dest: Tensor  # (rows, 2): first channel that a row writes, number of channels
    entries: Tensor  # (blocks, 8): by the columns above


@dataclass(frozen=True, eq=False)
class Walk:
    """The blocks in the order in which a direction walks them. Rows with the most blocks come first.

    Attributes:
        rows: blocks of channels that the direction writes, empty ones included: they get bias or zero.
        phases: residues that each row is divided into, (vertical, horizontal).
        whole: no block is ragged on the side that is read, and each begins at a multiple of its side.
        host: the tables on the CPU.
    """

    rows: int
    phases: Pair
    whole: bool
    host: Tables
    _devices: dict[torch.device, Tables] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Tables:
        """The tables on a device: copied there the first time, the same tensors ever after.

        Raises:
            RuntimeError: the first time falls into the capture of a CUDA graph, which cannot hold a copy from the host.
        """
        if device.type == "cpu":
            return self.host
        found = self._devices.get(device)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"fedpai_kernels.triton: the lists of this layer are not on {device} yet, and a CUDA graph is "
                    "being captured; run the layer once, forward and backward, before the capture"
                )
            found = self._devices.setdefault(device, Tables(*(t.to(device) for t in self.host)))
        return found


class BlockPlan:
    """The blocks of a plan. Immutable; made with :meth:`of`.

    Attributes:
        block: side of the blocks.
        count: surviving blocks.
        whole: no block is ragged on either side.
        forward: the list by output channels; in its order packed weight gradients are computed.
    """

    def __init__(self) -> None:
        raise TypeError("BlockPlan: use BlockPlan.of(plan, block)")

    block: int
    count: int
    whole: bool
    forward: Walk
    _kernel: Pair
    _entries: Tensor  # those of `forward`, by output channels, input channels, tap
    _inputs: Tensor  # (rows, 2): first channel and size of every block of input channels
    _input_grads: dict[tuple[Pair, Pair], Walk]

    @classmethod
    def of(cls, plan: Plan, block: int | None = None) -> BlockPlan:
        """The blocks of a plan, built the first time that its mask is seen with this side.

        Args:
            plan: of a mask that is made of whole blocks; a structure of larger blocks holds those of their divisors.
            block: 16, 32, 64 or 128; None takes the largest that the mask is made of.

        Raises:
            TypeError: `plan` is no Plan.
            ValueError: another block size, or a mask that keeps only a part of some block (the message names it).
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a fedpai_kernels.Plan, got {type(plan).__name__}")
        if block is not None and block not in BLOCKS:
            raise ValueError(f"block: expected {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]}, got {block!r}")
        with _lock:  # building twice would leave two copies on every device
            known = _block_plans.setdefault(plan._streams, {})
            if block not in known:
                side = _largest(plan) if block is None else block
                if side not in known:
                    known[side] = _build(plan, side)
                known[block] = known[side]
            return known[block]

    def input_grad(self, stride: Pair, dilation: Pair) -> Walk:
        """The list by input channels, its rows divided by the phases of this geometry."""
        h, w = stride
        phases = stride if h * w <= _MAX_PHASES else (1, 1)
        key = (phases, dilation if phases != (1, 1) else (1, 1))
        with _lock:
            if key not in self._input_grads:
                self._input_grads[key] = self._transposed(*key)
            return self._input_grads[key]

    def _transposed(self, phases: Pair, dilation: Pair) -> Walk:
        tap = self._entries[:, TAP].long()
        ky, kx = tap // self._kernel[1], tap % self._kernel[1]
        phase = (ky * dilation[0] % phases[0]) * phases[1] + kx * dilation[1] % phases[1]
        columns = [SOURCE_FIRST, SOURCE_SIZE, DEST_FIRST, DEST_SIZE, TAP, ORIGIN, SOURCE_STRIDE, DEST_STRIDE]
        return _walk(self.block, self._inputs, self._entries[:, columns], phase, phases)

    def gather_map(self) -> Tensor:
        """Where each weight of each block lies in the packed values: int64 (count, block, block), indexed by block in
        the order of :attr:`forward`, output and input channel; -1 in the padding of ragged blocks."""
        return gather_map(self.forward.host.entries, self.block)


def gather_map(entries: Tensor, block: int) -> Tensor:
    """As :meth:`BlockPlan.gather_map`, for the entries of any direction: (count, destination, source)."""
    side = torch.arange(block)
    columns = entries.long()[:, :, None, None].unbind(1)
    dest, source = side[:, None], side[None, :]
    places = columns[ORIGIN] + dest * columns[DEST_STRIDE] + source * columns[SOURCE_STRIDE]
    inside = (dest < columns[DEST_SIZE]) & (source < columns[SOURCE_SIZE])
    return torch.where(inside, places, -1)


# ------------------------------------------------------------------------------------------------------- building

# By the streams that all plans of a mask share; they go with the last of these plans.
_block_plans: weakref.WeakKeyDictionary[object, dict[int | None, BlockPlan]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _structure(plan: Plan, block: int) -> Structure:
    """Blocks of that side, or of the whole layer where that is smaller: one ragged block."""
    rows, columns = min(block, plan.mask_shape[0] // plan.groups), min(block, plan.mask_shape[1])
    return Block(rows, columns) if rows * columns > 1 else Unstructured()


def _is_made_of(plan: Plan, mask: Tensor, block: int) -> bool:
    try:
        check(mask, _structure(plan, block), plan.groups)
    except ValueError:
        return False
    return True


def _largest(plan: Plan) -> int:
    mask = plan.mask()
    for block in reversed(BLOCKS):
        if _is_made_of(plan, mask, block):
            return block
    raise ValueError(
        f"plan: the mask is not made of whole blocks of {BLOCKS[0]} output x {BLOCKS[0]} input channels, the smallest "
        f"there are kernels for: its structure is {plan.structure!r}. Prune with structure='{BLOCKS[0]}x{BLOCKS[0]}' "
        "or larger, or use fedpai_kernels.ops, whose kernels take any mask"
    )


def _cut(channels: int, groups: int, block: int) -> Tensor:
    """First channel and size of every block: int32 (groups * blocks per group, 2). `channels`: of one group."""
    first = torch.arange(0, channels, block)
    size = (channels - first).clamp(max=block)
    first = torch.arange(groups)[:, None] * channels + first
    return torch.stack([first.flatten(), size.repeat(groups)], 1).int()


def _build(plan: Plan, block: int) -> BlockPlan:
    mask = plan.mask()
    check(mask, _structure(plan, block), plan.groups)
    weights = grouped(mask, plan.groups)
    groups, outputs_per_group, inputs_per_group, _ = weights.shape
    outputs, inputs = _cut(outputs_per_group, groups, block), _cut(inputs_per_group, groups, block)
    heights = outputs[:, 1].view(groups, -1).long()
    widths = inputs[: len(inputs) // groups, 1].long()

    # Blocks that survive, (group, row, column, tap), and their places in the packed values (see the head).
    kept = weights[:, ::block, ::block]
    taps = kept.sum(3)
    weights_before = (taps * widths).cumsum(2) - taps * widths  # in an output channel, before this column
    weights_per_output = (taps * widths).sum(2)
    in_row = (heights * weights_per_output).flatten()
    row_origin = (in_row.cumsum(0) - in_row).view_as(weights_per_output)
    group, row, column, tap = kept.nonzero().unbind(1)
    rank_of_tap = (kept.cumsum(3) - 1)[group, row, column, tap]
    origin = row_origin[group, row] + weights_before[group, row, column] + rank_of_tap

    entries = torch.cat(
        [
            outputs[group * heights.shape[1] + row],
            inputs[group * len(widths) + column],
            torch.stack([tap, origin, weights_per_output[group, row], taps[group, row, column]], 1).int(),
        ],
        1,
    )
    made = BlockPlan.__new__(BlockPlan)
    made.block, made.count = block, len(entries)
    made._kernel = (plan.mask_shape[2], plan.mask_shape[3]) if plan.kind == "conv2d" else (1, 1)
    made._entries, made._inputs = entries, inputs
    made._input_grads = {}
    made.whole = outputs_per_group % block == 0 and inputs_per_group % block == 0
    made.forward = _walk(block, outputs, entries, torch.zeros(len(entries), dtype=torch.int64), (1, 1))
    return made


def _walk(block: int, dest: Tensor, entries: Tensor, phase: Tensor, phases: Sequence[int]) -> Walk:
    """Sorts entries by row (longest first) and phase; inside a phase they keep their order.

    `dest`: first channel and size of every row, by channels; `phase`: of each entry.
    """
    rows, per_row = len(dest), phases[0] * phases[1]
    row = torch.searchsorted(dest[:, 0].contiguous(), entries[:, DEST_FIRST].contiguous())
    order = torch.bincount(row, minlength=rows).argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(rows)
    key = place[row] * per_row + phase
    begin = torch.zeros(rows * per_row + 1, dtype=torch.int32)
    begin[1:] = torch.bincount(key, minlength=rows * per_row).cumsum(0)
    tables = Tables(begin, dest[order].contiguous(), entries[key.argsort(stable=True)].contiguous())
    source = entries[:, [SOURCE_FIRST, SOURCE_SIZE]]
    whole = bool((source[:, 1] == block).all() and (source[:, 0] % block == 0).all())
    return Walk(rows, (phases[0], phases[1]), whole, tables)
