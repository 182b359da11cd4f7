# SPDX-License-Identifier: Apache-2.0
"""How many weights each layer keeps, exactly. Formulas, sources and what is our own: docs/methods/allocation.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

NAMES = ("global", "uniform", "erk", "flops", "time")
PRICED = ("flops", "time")
"""Allocations that ask what a weight of each layer costs: its multiply-adds, or its time."""
TIME = 1.25
"""The time that ``"time"`` spends unless told, as a multiple of what uniform masks take."""

Allocation = str | Mapping[str, int]
Shapes = Mapping[str, Sequence[int]]
Prices = Mapping[str, float]
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

# Of an interval in which a multiplier lies: far beyond what shows in whole weights.
_HALVINGS = 60


def parse_allocation(allocation: str) -> tuple[str, float]:
    """The name of an allocation, and the time that it may take: ``"time:1.5"`` is ``("time", 1.5)``.

    Raises:
        ValueError: an unknown name, or a time that is no positive number.
    """
    name, colon, text = allocation.partition(":")
    if name not in NAMES or (colon and name != "time"):
        expected = ", ".join(NAMES)
        raise ValueError(f"allocation: got {allocation!r}, expected one of {expected}, time:X or counts by layer name")
    try:
        limit = float(text) if colon else TIME
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(f"allocation: got {allocation!r}, expected a positive number after 'time:'")
    return name, limit


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
    shapes: Shapes,
    sparsity: float,
    allocation: Allocation = "erk",
    *,
    keep_layers_alive: bool = True,
    prices: Prices | None = None,
) -> dict[str, int]:
    """Weights that each layer keeps; they add up to :func:`kept_count` exactly.

    ==========  ========================================================================================
    uniform     every layer the same density
    erk         Erdős–Rényi kernel (Evci et al., "Rigging the lottery", arXiv 1911.11134): the density of a layer of
                shape (out, in, kh, kw) is ``min(1, eps (out + in + kh + kw) / (out in kh kw))``, of a linear layer
                ``min(1, eps (out + in) / (out in))``, with one eps such that the total fits
    flops       every layer the same multiply-adds, or all it has
    time        of all counts whose time is at most X (1.25) times that of uniform ones, those that maximise
                ``sum over layers of (out + in + kh + kw) log(count)``; without the bound that is erk
    time:X      the same with another X
    ==========  ========================================================================================

    Fractions are rounded by largest remainder, ties to earlier layers; that may exceed a time by less than one weight
    a layer.

    Args:
        shapes: weight shape by layer name.
        sparsity: share of all weights that goes.
        allocation: a name, or the counts themselves, which are only checked.
        keep_layers_alive: no layer gets fewer than one weight.
        prices: what one weight of each layer costs: for ``"flops"`` its multiply-adds, for ``"time"`` its time, in any
            unit.

    Raises:
        ValueError: an unknown name, a sparsity out of range, counts that do not fit layers or total, prices that are
            missing, a time in which so many weights cannot be had.
    """
    kept = checked_count(shapes, sparsity, keep_layers_alive)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    return shares(shapes, allocation, sizes, kept, dict.fromkeys(shapes, int(keep_layers_alive)), prices)


def shares(
    shapes: Shapes,
    allocation: Allocation,
    costs: Mapping[str, int],
    kept: int,
    least: Mapping[str, int],
    prices: Prices | None = None,
) -> dict[str, int]:
    """Budgets of the layers, which add up to ``kept``; otherwise as :func:`allocate`.

    Args:
        shapes: weight shape by layer name.
        allocation: as for :func:`allocate`; the counts are then of the costs' unit.
        costs: what each layer costs with all its weights: their number, or their multiply-adds. Under ``"time"``,
            their number.
        kept: the budget, at least the sum of ``least`` and at most that of ``costs``.
        least: what each layer gets at least.
        prices: as for :func:`allocate`.

    Raises:
        ValueError: as :func:`allocate`.
    """
    if not isinstance(allocation, str):
        return _checked(allocation, costs, kept, least)
    name, limit = parse_allocation(allocation)
    if name == "global":
        raise ValueError("allocation: got 'global', which fixes no counts; expected one that does")
    each = {layer: costs[layer] / int(np.prod(shape)) for layer, shape in shapes.items()}
    if name == "uniform":
        weights = [float(costs[layer]) for layer in shapes]
    elif name == "flops":
        priced = _priced(allocation, shapes, prices)
        weights = [each[layer] / price for layer, price in priced.items()]
    else:
        weights = [each[layer] * sum(shape) for layer, shape in shapes.items()]
    wanted = np.array(weights)
    most, fewest = (np.array([bounds[layer] for layer in shapes], np.int64) for bounds in (costs, least))
    if name == "time":
        paid = np.array(list(_priced(allocation, shapes, prices).values()))
        found = _within_time(wanted, paid, most, kept, fewest, limit)
    else:
        found = _proportional(wanted, most, kept, fewest)
    return dict(zip(shapes, _rounded(found, most, kept).tolist(), strict=True))


def _priced(allocation: str, shapes: Shapes, prices: Prices | None) -> dict[str, float]:
    """The prices in the layers' order."""
    if prices is None:
        raise ValueError(
            f"allocation: got {allocation!r}, which needs what a weight of each layer costs; pass prices, or call "
            "prune or structured_masks, which take them from the model"
        )
    if odd := sorted(set(shapes) ^ set(prices)):
        raise ValueError(f"prices: layers {', '.join(odd)} are missing or unknown")
    for name, price in prices.items():
        if not 0 < price < math.inf:
            raise ValueError(f"prices: {name} costs {price}, expected a positive number")
    return {name: float(prices[name]) for name in shapes}


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


def _proportional(weights: _Floats, most: _Ints, kept: int, least: _Ints) -> _Floats:
    """Numbers between ``least`` and ``most``, proportional to ``weights`` where neither bound holds them."""
    low, high = 0.0, float((most / weights).max())
    for _ in range(200):  # bisection for the common factor, to the last bit
        middle = (low + high) / 2
        if np.clip(middle * weights, least, most).sum() <= kept:
            low = middle
        else:
            high = middle
    if np.clip(high * weights, least, most).sum() <= kept:
        low = high
    return np.clip(low * weights, least, most)


def _within_time(
    weights: _Floats, prices: _Floats, most: _Ints, kept: int, least: _Ints, limit: float
) -> _Floats:
    """Numbers n between ``least`` and ``most`` that add up to ``kept`` and maximise ``sum(weights log n)``, among those
    whose time ``sum(prices n)`` is at most ``limit`` times that of uniform ones.

    With multipliers u of the count and v >= 0 of the time the maximum is at ``n = weights / (u + v prices)``, within
    the bounds. The time never rises with v. Sums are exact, so that every machine finds the same numbers.

    Raises:
        ValueError: not even the cheapest weights take so little time.
    """
    # In these units uniform shares take the time ``kept``.
    prices = prices * (int(most.sum()) / math.fsum(most * prices))
    weights = weights * (kept / math.fsum(weights))
    cheapest, rest = least.copy(), kept - int(least.sum())
    for layer in np.argsort(prices, kind="stable"):
        cheapest[layer] += min(rest, int(most[layer] - least[layer]))
        rest -= int(cheapest[layer] - least[layer])
    if math.fsum(prices * cheapest) > limit * kept:
        raise ValueError(
            f"allocation: 'time:{limit:g}' is less than {kept} weights can take; the cheapest take "
            f"{math.fsum(prices * cheapest) / kept:.3g} times what uniform ones do"
        )

    def shares(v: float) -> _Floats:
        return _of_count(weights, v * prices, most, kept, least)

    if math.fsum(prices * (found := shares(0.0))) <= limit * kept:
        return found
    found = cheapest.astype(np.float64)  # what v = infinity gives
    low, high = 0.0, 1.0  # of v / (1 + v)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle == high:
            break
        if math.fsum(prices * (tried := shares(middle / (1 - middle)))) > limit * kept:
            low = middle
        else:
            high, found = middle, tried
    return found


def _of_count(weights: _Floats, prices: _Floats, most: _Ints, kept: int, least: _Ints) -> _Floats:
    """``weights / (u + prices)`` within the bounds, with the u that makes them add up to ``kept`` or hardly less."""
    layers = list(zip(weights.tolist(), prices.tolist(), least.tolist(), most.tolist(), strict=True))

    def at(u: float) -> list[float]:
        return [
            float(upper) if u + price <= 0 else min(max(weight / (u + price), lower), upper)
            for weight, price, lower, upper in layers
        ]

    low, high = -float(prices.max()), float(kept)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if math.fsum(at(middle)) > kept:
            low = middle
        else:
            high = middle
    return np.array(at(high))


def _rounded(shares: _Floats, most: _Ints, kept: int) -> _Ints:
    """Integers up to ``most`` that add up to ``kept``: rounded down, then one more by largest remainder."""
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")
    while (missing := kept - int(counts.sum())) > 0:
        room = order[counts[order] < most[order]]
        counts[room[:missing]] += 1
    return counts
