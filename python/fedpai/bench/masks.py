# SPDX-License-Identifier: Apache-2.0
"""Masks for a measurement: of one layer at random, or of a whole network by a criterion."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpai.bench.errors import BenchError
from fedpai_kernels.structure import Block, Channel, FanIn, NOfM, Structure, grouped, parse

SCORING_DATA = "fashion-mnist"
_NEEDS_DATA = ("grasp", "snip")


def uniform_mask(
    shape: Sequence[int], density: float, seed: int = 0, *, structure: str = "weight", groups: int = 1
) -> Tensor:
    """A random mask of one layer that keeps a share of what its structure keeps together.

    The same arguments give the same mask.

    Args:
        shape: of the weight.
        density: exactly ``round(density * n)`` of the n weights or blocks are kept, those at the ragged edges
            among them; with "fan-in", of each output's n weights; with "channel", ``round(sqrt(density) * n)`` of the n
            output channels and of the n input channels of each group; with N:M, it must be N / M, and of fewer than M
            input channels at the end that share is kept, rounded up. Always at least one.
        seed: of the choice.
        structure: a name of :mod:`fedpai_kernels.structure`.
        groups: of a convolution.

    Raises:
        BenchError: an unknown structure, or a density that it cannot have.
    """
    found = check_structure(structure)
    text = f"{'x'.join(map(str, shape))}|{density:.6g}|{seed}"
    if str(found) != "weight":
        text += f"|{found}|{groups}"
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    sizes = grouped(torch.empty(tuple(shape), device="meta"), groups).shape
    return _drawn(found, density, sizes, generator).reshape(tuple(shape))


def _drawn(structure: Structure, density: float, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """A mask of sizes (groups, outputs, inputs, taps)."""
    groups, outputs, inputs, taps = sizes
    if isinstance(structure, NOfM):
        n, m = structure.n, structure.m
        if not math.isclose(density, n / m, abs_tol=1e-3):
            raise BenchError(f"--structure {structure}: got a density of {density:g}, its masks keep {n / m:g}")
        runs = torch.rand(groups, outputs, inputs, taps, generator=generator).split(m, 2)
        return torch.cat([_least(run, 2, math.ceil(n * run.shape[2] / m)) for run in runs], 2)
    if isinstance(structure, FanIn):
        order = torch.rand(groups * outputs, inputs * taps, generator=generator)
        return _least(order, 1, _share(density, inputs * taps))
    if isinstance(structure, Channel):
        rows, columns = (
            _least(torch.rand(groups, size, generator=generator), 1, _share(math.sqrt(density), size))
            for size in (outputs, inputs)
        )
        return (rows[:, :, None, None] & columns[:, None, :, None]).expand(tuple(sizes))
    height, width, together = 1, 1, False
    if isinstance(structure, Block):
        height, width, together = structure.rows, structure.columns, structure.taps
    row, column = torch.arange(outputs) // height, torch.arange(inputs) // width
    counts = groups, int(row[-1]) + 1, int(column[-1]) + 1, 1 if together else taps
    blocks = torch.zeros(math.prod(counts), dtype=torch.bool)
    blocks[torch.randperm(len(blocks), generator=generator)[: _share(density, len(blocks))]] = True
    return blocks.reshape(counts)[:, row][:, :, column].expand(tuple(sizes))


def _share(density: float, count: int) -> int:
    return max(1, round(density * count))


def _least(order: Tensor, dim: int, kept: int) -> Tensor:
    """Where along `dim` the `kept` least numbers are."""
    return order.argsort(dim).argsort(dim) < kept


def check_structure(name: str) -> Structure:
    """The structure of a name.

    Raises:
        BenchError: there is none.
    """
    try:
        return parse(name)
    except ValueError as error:
        raise BenchError(f"--{error}") from error


def check_kind(kind: str) -> tuple[str, str | None]:
    """A kind of mask as criterion and allocation: ``"grasp@time"`` is ``("grasp", "time")``.

    Raises:
        BenchError: unless :func:`network_masks` knows both.
    """
    from fedpai.pruning import criteria, parse_allocation

    criterion, at, allocation = kind.partition("@")
    if criterion not in criteria():
        raise BenchError(f"--mask: unknown kind {kind!r}, expected one of {', '.join(criteria())}")
    try:
        if at:
            parse_allocation(allocation)
    except ValueError as error:
        raise BenchError(f"--mask {kind}: {error}") from None
    return criterion, allocation if at else None


def network_masks(
    model: nn.Module,
    kind: str,
    sparsity: float,
    *,
    structure: str = "weight",
    data: str = SCORING_DATA,
    seed: int = 0,
) -> tuple[dict[str, Tensor], str | None]:
    """Masks of all convolutions and linear layers.

    Args:
        model: of :mod:`fedpai.models`; not changed.
        kind: a criterion of :func:`fedpai.pruning.criteria`, with its own allocation, or with another one after "@".
        sparsity: share of the weights that goes.
        structure: of the masks; a name of :mod:`fedpai_kernels.structure`.
        data: images for the criteria that score with them; one channel is shown to all of the network's.
        seed: of everything random.

    Returns:
        The masks by module name, and the data they were scored with, if any.

    Raises:
        BenchError: an unknown kind, a sparsity that cannot be, or data that are missing.
    """
    from fedpai import pruning

    criterion, allocation = check_kind(kind)
    check_structure(structure)
    batch = _scoring_batch(model, data, seed) if criterion in _NEEDS_DATA else None
    try:
        masks = pruning.prune(
            model, sparsity, criterion, allocation=allocation, data=batch, seed=seed, structure=structure
        )
    except ValueError as error:
        raise BenchError(f"--mask {kind}: {error}") from error
    return masks, data if batch is not None else None


def _scoring_batch(model: nn.Module, name: str, seed: int) -> tuple[Tensor, Tensor]:
    from fedpai import data

    channels, size, _ = getattr(model, "input_shape", None) or (3, 32, 32)
    try:
        dataset = data.load(name, image_size=size)
        images, labels = data.balanced_batch(dataset, seed=seed)
    except ValueError as error:
        raise BenchError(f"--mask-data: {error}") from error
    if images.shape[1] != channels:
        if images.shape[1] != 1:
            raise BenchError(
                f"--mask-data: {name} has {images.shape[1]} channels, the network takes {channels}"
            )
        images = images.expand(-1, channels, -1, -1).contiguous()
    return images, labels
