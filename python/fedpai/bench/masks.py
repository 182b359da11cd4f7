# SPDX-License-Identifier: Apache-2.0
"""Masks for a measurement: of one layer at random, or of a whole network by a criterion."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpai.bench.errors import BenchError

SCORING_DATA = "fashion-mnist"
_NEEDS_DATA = ("grasp", "snip")


def uniform_mask(shape: Sequence[int], density: float, seed: int = 0) -> Tensor:
    """A random mask of exactly ``round(density * weights)`` survivors, at least one.

    The same shape, density and seed give the same mask.
    """
    numel = 1
    for size in shape:
        numel *= size
    text = f"{'x'.join(map(str, shape))}|{density:.6g}|{seed}"
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    mask = torch.zeros(numel, dtype=torch.bool)
    kept = max(1, round(density * numel))
    mask[torch.randperm(numel, generator=generator)[:kept]] = True
    return mask.reshape(tuple(shape))


def check_kind(kind: str) -> None:
    """Raises a BenchError unless :func:`network_masks` knows the kind of mask."""
    from fedpai.pruning import criteria

    if kind not in criteria():
        raise BenchError(f"--mask: unknown kind {kind!r}, expected one of {', '.join(criteria())}")


def network_masks(
    model: nn.Module, kind: str, sparsity: float, *, data: str = SCORING_DATA, seed: int = 0
) -> tuple[dict[str, Tensor], str | None]:
    """Masks of all convolutions and linear layers.

    Args:
        model: of :mod:`fedpai.models`; not changed.
        kind: a criterion or allocation of :func:`fedpai.pruning.criteria`.
        sparsity: share of the weights that goes.
        data: images for the criteria that score with them; one channel is shown to all of the network's.
        seed: of everything random.

    Returns:
        The masks by module name, and the data they were scored with, if any.

    Raises:
        BenchError: an unknown kind, a sparsity that cannot be, or data that are missing.
    """
    from fedpai import pruning

    check_kind(kind)
    batch = _scoring_batch(model, data, seed) if kind in _NEEDS_DATA else None
    try:
        masks = pruning.prune(model, sparsity, kind, data=batch, seed=seed)
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
