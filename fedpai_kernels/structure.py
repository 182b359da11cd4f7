# SPDX-License-Identifier: Apache-2.0
"""Structures: which weights of a layer a mask keeps or drops together.

    parse("16x1") == Block(16, 1)
    check(mask, Block(16, 1))  # ValueError: names the first block of which only a part is kept
    describe(mask)             # the coarsest structure that a mask has, by name

A weight is (out, in / groups, kernel_h, kernel_w) of a convolution or (out, in) of a linear layer, which has one tap.
Names are what plans, pruning criteria, benchmarks and command lines use:

    weight          nothing is kept together
    16x1            blocks of 16 output x 1 input channels, for each kernel tap by itself; any RxC
    16x1-taps       the same with all taps together
    channel         whole output channels and whole input channels
    2:4             of each 4 consecutive input channels, at each tap, at most 2 weights are kept; any N:M
    fan-in          every output channel keeps equally many weights
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Block",
    "Channel",
    "FanIn",
    "NOfM",
    "Structure",
    "Unstructured",
    "check",
    "describe",
    "grouped",
    "parse",
]

# What `describe` tries: rows and columns up to the first, N:M in this order.
_LARGEST_SIDE = 64
_KNOWN_N_OF_M = ((1, 2), (1, 4), (2, 4), (4, 8))


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` output channels x ``columns`` input channels; smaller at the ragged edge.

    Output channels are cut inside each group of a convolution, so no block spans two groups.

    Attributes:
        rows, columns: at least 1; a single weight is :class:`Unstructured`, not a block.
        taps: whether a block holds all taps of its kernels, else each tap has blocks of its own.
    """

    rows: int
    columns: int
    taps: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(
                f"structure: got a block of {self.rows}x{self.columns}, expected sides of at least 1"
            )
        if self.rows * self.columns == 1 and not self.taps:
            raise ValueError("structure: a block of 1x1 is a single weight; that structure is Unstructured()")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}{'-taps' if self.taps else ''}"


@dataclass(frozen=True)
class Channel:
    """Whole channels: the mask is kept outputs x kept inputs, with all taps, in each group."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class NOfM:
    """At most ``n`` of each ``m`` consecutive input channels of an output channel and tap; 0 < n < m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"structure: got {self.n}:{self.m}, expected N:M with 0 < N < M")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class FanIn:
    """Every output channel keeps equally many weights."""

    def __str__(self) -> str:
        return "fan-in"


Structure = Unstructured | Block | Channel | NOfM | FanIn


def parse(text: str) -> Structure:
    """The structure of that name; ``str`` is the inverse, except that ``"1x1"`` is ``"weight"``.

    Raises:
        ValueError: no structure has this name.
    """
    for named in (Unstructured(), Channel(), FanIn()):
        if text in (str(named), "1x1" if isinstance(named, Unstructured) else None):
            return named
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(-taps)?", text, re.ASCII):
        return Block(int(found[1]), int(found[2]), bool(found[3]))
    if (found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text, re.ASCII)) and int(found[1]) < int(found[2]):
        return NOfM(int(found[1]), int(found[2]))
    raise ValueError(
        f"structure: got {text!r}, expected 'weight', a block such as '16x1' or '8x8-taps', 'channel', "
        "N:M with N < M such as '2:4', or 'fan-in'"
    )


def grouped(weight: Tensor, groups: int = 1) -> Tensor:
    """The weight as (groups, out / groups, in / groups, taps), a view where strides allow it.

    Raises:
        ValueError: neither 2 nor 4 dimensions, or groups that do not divide the output channels.
    """
    if weight.dim() not in (2, 4):
        raise ValueError(
            "mask: expected 4 dimensions (out, in / groups, kernel_h, kernel_w) or 2 (out, in), "
            f"got shape {tuple(weight.shape)}"
        )
    out, columns = weight.shape[:2]
    if groups < 1 or out % groups:
        raise ValueError(f"groups: expected a divisor of the {out} output channels, got {groups}")
    return weight.reshape(groups, out // groups, columns, weight.shape[2:].numel())


def check(mask: Tensor, structure: Structure, groups: int = 1) -> None:
    """Checks that a mask has a structure.

    Args:
        mask: bool tensor of the weight's shape.
        structure: what it must be.
        groups: groups of the convolution.

    Raises:
        TypeError: ``mask`` is not of dtype bool.
        ValueError: it is not of this structure: the message names the first block, group of input channels or
            output channel that is not. Or a block or an M larger than the layer, a wrong shape, wrong groups.
    """
    weights = _bools(mask, groups)
    if isinstance(structure, Block):
        _check_block(weights, structure, mask)
    elif isinstance(structure, NOfM):
        _check_n_of_m(weights, structure, mask)
    elif isinstance(structure, Channel):
        _check_channel(weights, mask)
    elif isinstance(structure, FanIn):
        _check_fan_in(weights)


def describe(mask: Tensor, groups: int = 1) -> str:
    """The coarsest structure that is recognised in a mask, by name.

    In this order: ``"empty"``, ``"dense"``, ``"channel"``, the largest block with sides of 1, 2, 4, ... 64 that fit
    the layer, 1:2, 1:4, 2:4 or 4:8 with exactly N weights in every group of M, ``"fan-in"`` if there are several
    output channels, ``"weight"``.

    Args:
        mask: bool tensor of the weight's shape.
        groups: groups of the convolution.

    Raises:
        TypeError, ValueError: as :func:`check`, for what is no mask at all.
    """
    weights = _bools(mask, groups).cpu()
    kept = int(weights.count_nonzero())
    if kept in (0, weights.numel()):
        return "dense" if kept else "empty"
    if _is_channel(weights):
        return str(Channel())
    # A mask is RxC exactly if rows are equal within their blocks, and columns likewise: two searches, each of which
    # leaves one row or column of a block for the next.
    rows, once = _largest_side(weights, 1)
    columns, once = _largest_side(once, 2)
    taps = once.shape[3] > 1 and torch.equal(once, once[..., :1].expand_as(once))
    if taps or rows * columns > 1:
        return str(Block(rows, columns, taps))
    for n, m in _KNOWN_N_OF_M:
        if _keeps_exactly(weights, n, m):
            return str(NOfM(n, m))
    if mask.shape[0] > 1 and _has_fan_in(weights):
        return str(FanIn())
    return str(Unstructured())


def _bools(mask: Tensor, groups: int) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}; `mask != 0` makes one")
    return grouped(mask, groups)


# --------------------------------------------------------------------------------------------------------- blocks


def _check_block(weights: Tensor, block: Block, mask: Tensor) -> None:
    groups, out, columns, _ = weights.shape
    if block.rows > out or block.columns > columns:
        raise ValueError(
            f"structure: a block of {block.rows}x{block.columns} is larger than the layer's {out} output and "
            f"{columns} input channels{' per group' if groups > 1 else ''}"
        )
    # Every weight against the first of its block.
    first_rows = torch.arange(out, device=mask.device) // block.rows * block.rows
    first_columns = torch.arange(columns, device=mask.device) // block.columns * block.columns
    firsts = weights[..., :1] if block.taps else weights
    firsts = firsts.index_select(1, first_rows).index_select(2, first_columns).expand_as(weights)
    if torch.equal(firsts, weights):
        return
    split = (weights != firsts).nonzero()
    split[:, 1] //= block.rows
    split[:, 2] //= block.columns
    split[:, 3] *= not block.taps
    places = split @ split.new_tensor([out * columns, columns, 1, 0]) * weights.shape[3] + split[:, 3]
    group, row, column, tap = split[places.argmin()].tolist()
    rows = range(row * block.rows, min((row + 1) * block.rows, out))
    inputs = range(column * block.columns, min((column + 1) * block.columns, columns))
    taps = slice(None) if block.taps else slice(tap, tap + 1)
    part = weights[group, rows.start : rows.stop, inputs.start : inputs.stop, taps]
    where = _span("output", range(rows.start + group * out, rows.stop + group * out))
    where += f", {_span('input', inputs)}{_of_group(group, groups)}{'' if block.taps else _tap(tap, mask)}"
    raise ValueError(
        f"structure: the mask is not {block}: the block of {where} keeps {int(part.sum())} of its "
        f"{part.numel()} weights"
    )


def _largest_side(weights: Tensor, dim: int) -> tuple[int, Tensor]:
    """The longest run of equal slices along ``dim`` (1, 2, 4, ...), and the first slice of each run."""
    side, size = 1, weights.shape[dim]
    while 2 * side <= min(size, _LARGEST_SIDE):
        along = weights.transpose(0, dim)
        first, second = along[0::2].transpose(0, dim), along[1::2].transpose(0, dim)
        if not torch.equal(first.narrow(dim, 0, second.shape[dim]), second):
            break
        side, weights = 2 * side, first
    return side, weights


# ------------------------------------------------------------------------------------------------------- channels


def _outer(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs and which inputs of each group keep any weight: (groups, out), (groups, in)."""
    pairs = weights.any(3)
    return pairs.any(2), pairs.any(1)


def _is_channel(weights: Tensor) -> bool:
    # Nearly every mask that is no such product shows it in the first kernel that keeps anything, or beside it.
    taps = weights.shape[3]
    group, row, column = np.unravel_index(int(weights.numpy().argmax()) // taps, weights.shape[:3])
    same_row, same_column = weights[group, row].all(1), weights[group, :, column].all(1)
    if not same_row[column] or weights[group].count_nonzero() != same_row.sum() * same_column.sum() * taps:
        return False
    outputs, inputs = _outer(weights)
    kept = (outputs.sum(1) * inputs.sum(1)).sum() * weights.shape[3]
    return bool(weights.count_nonzero() == kept)


def _check_channel(weights: Tensor, mask: Tensor) -> None:
    outputs, inputs = _outer(weights)
    product = (outputs[:, :, None] & inputs[:, None, :])[..., None].expand_as(weights)
    if torch.equal(product, weights):
        return
    groups, out = weights.shape[:2]
    group, row, column, tap = (product != weights).nonzero()[0].tolist()
    raise ValueError(
        f"structure: the mask is not channel: it keeps weights of output channel {group * out + row} and of input "
        f"channel {column}{_of_group(group, groups)}, but not the one between them{_tap(tap, mask, ' at')}"
    )


# ------------------------------------------------------------------------------------------------- N:M and fan-in


def _counts(weights: Tensor, m: int) -> Tensor:
    """Kept weights of each run of ``m`` input channels: (groups, out, runs, taps); the last run may be shorter."""
    ragged = -weights.shape[2] % m
    padded = torch.nn.functional.pad(weights, (0, 0, 0, ragged)) if ragged else weights
    return torch.stack(padded.unflatten(2, (-1, m)).unbind(3)).sum(0, dtype=torch.int32)


def _check_n_of_m(weights: Tensor, structure: NOfM, mask: Tensor) -> None:
    groups, out, columns, _ = weights.shape
    n, m = structure.n, structure.m
    if m > columns:
        raise ValueError(
            f"structure: {structure} is wider than the layer's {columns} input channels"
            f"{' per group' if groups > 1 else ''}"
        )
    counts = _counts(weights, m)
    if bool((counts <= n).all()):
        return
    group, row, run, tap = (counts > n).nonzero()[0].tolist()
    inputs = range(run * m, min((run + 1) * m, columns))
    raise ValueError(
        f"structure: the mask is not {structure}: output channel {group * out + row}, {_span('input', inputs)}"
        f"{_of_group(group, groups)}{_tap(tap, mask)} keeps {int(counts[group, row, run, tap])} of its {len(inputs)} "
        f"weights, expected at most {n}"
    )


def _keeps_exactly(weights: Tensor, n: int, m: int) -> bool:
    whole = weights.shape[2] // m
    if whole == 0 or weights[0, 0, :m, 0].count_nonzero() != n:
        return False
    counts = _counts(weights, m)
    return bool((counts[:, :, :whole] == n).all()) and bool((counts[:, :, whole:] <= n).all())


def _has_fan_in(weights: Tensor) -> bool:
    rows = weights.flatten(0, 1).flatten(1)
    if rows[0].count_nonzero() != rows[-1].count_nonzero():
        return False
    counts = rows.count_nonzero(1)
    return bool((counts == counts[0]).all())


def _check_fan_in(weights: Tensor) -> None:
    counts = weights.flatten(0, 1).flatten(1).count_nonzero(1)
    wrong = (counts != counts[0]).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"structure: the mask is not fan-in: output channel {row} keeps {int(counts[row])} weights, "
            f"output channel 0 keeps {int(counts[0])}"
        )


# ---------------------------------------------------------------------------------------------------------- words


def _span(what: str, channels: range) -> str:
    if len(channels) == 1:
        return f"{what} channel {channels.start}"
    return f"{what} channels {channels.start} to {channels.stop - 1}"


def _of_group(group: int, groups: int) -> str:
    return f" of group {group}" if groups > 1 else ""


def _tap(tap: int, mask: Tensor, before: str = ",") -> str:
    return f"{before} tap {divmod(tap, mask.shape[3])}" if mask.dim() == 4 else ""
