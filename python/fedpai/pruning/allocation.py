# SPDX-License-Identifier: Apache-2.0
"""How many weights each layer keeps, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Allocation = str | Mapping[str, int]
Shapes = Mapping[str, Sequence[int]]
_Ints = npt.NDArray[np.int64]


def kept_count(total: int, sparsity: float) -> int:
    """``round((1 - sparsity) * total)``: the number of weights that survive.

    Raises:
        ValueError: a sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, expected a number in [0, 1)")
    return round((1 - sparsity) * total)


def checked_count(shapes: Shapes, sparsity: float, keep_layers_alive: bool) -> int:
    """:func:`kept_count` over all layers, checked to be enough for them.

    Raises:
        ValueError: nothing would be kept, or fewer weights than layers that must each keep one.
    """
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    kept = kept_count(total, sparsity)
    if kept == 0:
        raise ValueError(f"sparsity: {sparsity} keeps none of {total} weights")
    if keep_layers_alive and kept < len(shapes):
        raise ValueError(
            f"sparsity: {sparsity} keeps {kept} of {total} weights, fewer than the {len(shapes)} layers "
            "that must each keep one; lower it, or allow empty layers with keep_layers_alive=False"
        )
    return kept


def allocate(
    shapes: Shapes, sparsity: float, allocation: Allocation = "erk", *, keep_layers_alive: bool = True
) -> dict[str, int]:
    """Weights that each layer keeps; they add up to :func:`kept_count` exactly.

    ``"uniform"``: every layer the same density. ``"erk"`` (Erdős–Rényi kernel; Evci et al., "Rigging the
    lottery", arXiv 1911.11134): the density of a layer of shape (out, in, kh, kw) is
    ``min(1, eps (out + in + kh + kw) / (out in kh kw))``, of a linear layer
    ``min(1, eps (out + in) / (out in))``, with one eps such that the total fits. Fractions are rounded by
    largest remainder, ties to earlier layers.

    Args:
        shapes: weight shape by layer name.
        sparsity: share of all weights that goes.
        allocation: ``"uniform"``, ``"erk"``, or the counts themselves, which are only checked.
        keep_layers_alive: no layer gets fewer than one weight.

    Raises:
        ValueError: an unknown name, a sparsity out of range, counts that do not fit layers or total.
    """
    kept = checked_count(shapes, sparsity, keep_layers_alive)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    return shares(shapes, allocation, sizes, kept, dict.fromkeys(shapes, int(keep_layers_alive)))


def shares(
    shapes: Shapes, allocation: Allocation, costs: Mapping[str, int], kept: int, least: Mapping[str, int]
) -> dict[str, int]:
    """Budgets of the layers, which add up to ``kept``; otherwise as :func:`allocate`.

    Args:
        shapes: weight shape by layer name.
        allocation: as for :func:`allocate`; the counts are then of the costs' unit.
        costs: what each layer costs with all its weights: their number, or their multiply-adds.
        kept: the budget, at least the sum of ``least`` and at most that of ``costs``.
        least: what each layer gets at least.

    Raises:
        ValueError: an unknown name, counts that do not fit layers or total.
    """
    if not isinstance(allocation, str):
        return _checked(allocation, costs, kept, least)
    if allocation == "uniform":
        weights = [float(cost) for cost in costs.values()]
    elif allocation == "erk":
        weights = [costs[n] * sum(shape) / int(np.prod(shape)) for n, shape in shapes.items()]
    else:
        raise ValueError(f"allocation: got {allocation!r}, expected 'uniform', 'erk' or counts by layer name")
    all_of_it, some = (np.array([values[n] for n in shapes], np.int64) for values in (costs, least))
    return dict(zip(shapes, _apportion(np.array(weights), all_of_it, kept, some).tolist(), strict=True))


def _checked(
    counts: Mapping[str, int], sizes: Mapping[str, int], kept: int, least: Mapping[str, int]
) -> dict[str, int]:
    """Counts that somebody else chose."""
    if set(counts) != set(sizes):
        odd = sorted(set(counts) ^ set(sizes))
        raise ValueError(f"allocation: layers {', '.join(odd)} are missing or unknown")
    for name, size in sizes.items():
        if not least[name] <= counts[name] <= size:
            raise ValueError(
                f"allocation: {name} gets {counts[name]} weights, expected {least[name]} to {size}"
            )
    if sum(counts.values()) != kept:
        raise ValueError(f"allocation: counts add up to {sum(counts.values())}, the sparsity asks for {kept}")
    return {name: int(counts[name]) for name in sizes}


def _apportion(weights: npt.NDArray[np.float64], sizes: _Ints, kept: int, least: _Ints) -> _Ints:
    """Integers between ``least`` and ``sizes``, proportional to ``weights`` where neither bound holds
    them."""
    low, high = 0.0, float((sizes / weights).max())
    for _ in range(200):  # bisection for the common factor, to the last bit
        middle = (low + high) / 2
        if np.clip(middle * weights, least, sizes).sum() <= kept:
            low = middle
        else:
            high = middle
    if np.clip(high * weights, least, sizes).sum() <= kept:
        low = high
    shares = np.clip(low * weights, least, sizes)
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")  # largest remainder first
    while (missing := kept - int(counts.sum())) > 0:
        room = order[counts[order] < sizes[order]]
        counts[room[:missing]] += 1
    return counts
