# SPDX-License-Identifier: Apache-2.0
"""Units: what of a layer is kept or dropped together, and the best ones that a budget allows.

The score of a unit is the sum of its weights' scores divided by their number: among units of one size that is
the order of the sums, and a block that the layer's edge cuts off competes on equal terms.

One rule fills a budget: go down the ranking once, and keep each unit that still fits in what is left. With
units of one size the total is therefore ``budget // size * size``, and never above the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedpai.pruning.layers import Tensors
from fedpai_kernels.structure import Block, FanIn, grouped

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Units:
    """Candidates of one layer.

    Attributes:
        scores: (n,) mean scores; higher = keep.
        sizes: (n,) weights in each.
        mask: from n flags to the mask of the layer's weight.
    """

    scores: _Floats
    sizes: _Ints
    mask: Callable[[_Flags], torch.Tensor]


# ------------------------------------------------------------------------------------------------------ kinds of unit


class Blocks:
    """One layer cut into blocks, smaller at the ragged edges. A layer smaller than a block is all edge.

    Args:
        shape: of the weight.
        block: how many output and input channels, and whether with all taps; ``None``: single weights.
        groups: of the convolution; no block spans two.
    """

    def __init__(self, shape: torch.Size, block: Block | None, groups: int) -> None:
        self._shape, self._groups = shape, groups
        _, rows, columns, taps = grouped(torch.empty(shape, device="meta"), groups).shape
        self._whole = rows, columns, taps
        asked = (block.rows, block.columns, taps if block.taps else 1) if block else (1, 1, 1)
        self._block = tuple(map(min, asked, self._whole))
        edges = [_lengths(size, side) for size, side in zip(self._whole, self._block, strict=True)]
        sizes = edges[0][:, None, None] * edges[1][:, None] * edges[2]
        self._grid = (groups, *sizes.shape)
        self.sizes: _Ints = np.broadcast_to(sizes, self._grid).ravel()

    @property
    def largest(self) -> int:
        """Weights in a block that no edge cuts."""
        return int(np.prod(self._block))

    @property
    def smallest(self) -> int:
        """Weights in the block of which the edges leave least."""
        return int(self.sizes.min())

    def check(self, mask: torch.Tensor, name: str) -> None:
        """Raises a ValueError unless the mask keeps whole blocks."""
        if not set(np.unique(self.units(mask.double(), None).scores)) <= {0.0, 1.0}:
            raise ValueError(f"mask of {name} keeps parts of blocks")

    def random(self, generator: torch.Generator) -> torch.Tensor:
        """Scores of the weights: one normal number a block."""
        return self._spread(torch.randn(len(self.sizes), generator=generator))

    def units(self, score: torch.Tensor, within: torch.Tensor | None) -> Units:
        """The blocks that ``within`` keeps (``None``: all), scored."""
        means: _Floats = self._sums(score.detach().to("cpu", torch.float64)).numpy().ravel() / self.sizes
        device = score.device
        if within is None:
            return Units(means, self.sizes, lambda flags: self._mask(flags, device))
        alive = np.flatnonzero(self._sums(within.cpu().double()).numpy().ravel())

        def mask(flags: _Flags) -> torch.Tensor:
            full = np.zeros(len(means), np.bool_)
            full[alive] = flags
            return self._mask(full, device)

        return Units(means[alive], self.sizes[alive], mask)

    def _spread(self, numbers: torch.Tensor) -> torch.Tensor:
        """One number a block, to the weights of the layer."""
        grid = numbers.view(self._grid)
        for dim, (size, side) in enumerate(zip(self._whole, self._block, strict=True), start=1):
            if side > 1:
                grid = grid.index_select(dim, torch.arange(size) // side)
        return grid.reshape(self._shape)

    def _mask(self, flags: _Flags, device: torch.device) -> torch.Tensor:
        return self._spread(torch.from_numpy(flags)).contiguous().to(device)

    def _sums(self, weights: torch.Tensor) -> torch.Tensor:
        sums = grouped(weights, self._groups)
        for dim, (size, side) in enumerate(zip(self._whole, self._block, strict=True), start=1):
            if side > 1:
                ragged = [0, 0] * (3 - dim) + [0, -size % side]
                sums = torch.nn.functional.pad(sums, ragged).unflatten(dim, (-1, side)).sum(dim + 1)
        return sums


class FanIns:
    """One layer, of which every output channel keeps equally many weights.

    Unit i holds the i-th best weight of each output channel.

    Args:
        shape: of the weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape

    @property
    def largest(self) -> int:
        """Weights in a unit: one for each output channel."""
        return int(self._shape[0])

    smallest = largest

    def check(self, mask: torch.Tensor, name: str) -> None:
        """Raises a ValueError unless all output channels keep equally many weights."""
        if len(mask.flatten(1).sum(1).unique()) > 1:
            raise ValueError(f"mask of {name} keeps more weights of some output channels than of others")

    def random(self, generator: torch.Generator) -> torch.Tensor:
        """Scores of the weights: one normal number each."""
        return torch.randn(self._shape, generator=generator)

    def units(self, score: torch.Tensor, within: torch.Tensor | None) -> Units:
        """As many units as ``within`` keeps weights of each output channel (``None``: all)."""
        rows = score.detach().to("cpu", torch.float64).flatten(1)
        count = rows.shape[1]
        if within is not None:
            alive = within.cpu().flatten(1)
            rows = rows.masked_fill(~alive, -torch.inf)
            count = int(alive.sum(1).min())
        best, order = rows.sort(dim=1, descending=True, stable=True)
        device = score.device

        def mask(flags: _Flags) -> torch.Tensor:
            kept = order[:, : int(flags.sum())]
            return (
                torch.zeros_like(order, dtype=torch.bool).scatter_(1, kept, True).view(self._shape).to(device)
            )

        sizes = np.full(count, self.largest, np.int64)
        return Units(best[:, :count].mean(0).numpy(), sizes, mask)


Cut = Blocks | FanIns


def cut_layer(shape: torch.Size, structure: Block | FanIn | None, groups: int) -> Cut:
    """A layer in units of that structure; ``None``: single weights."""
    return FanIns(shape) if isinstance(structure, FanIn) else Blocks(shape, structure, groups)


def _lengths(size: int, side: int) -> _Ints:
    """How ``size`` is cut into pieces of ``side``."""
    starts = np.arange(0, size, side)
    return np.minimum(side, size - starts)


# ------------------------------------------------------------------------------------------------------------- choice


def best_together(units: Mapping[str, Units], prices: Mapping[str, int], budget: int, alive: bool) -> Tensors:
    """Masks of the best units of all layers in one ranking.

    Args:
        units: by layer name.
        prices: what one weight of each layer costs.
        budget: of all layers.
        alive: every layer's best unit comes before all others.
    """
    scores = np.concatenate([_ranked(layer, alive) for layer in units.values()])
    costs = np.concatenate([layer.sizes * prices[name] for name, layer in units.items()])
    bounds = np.cumsum([len(layer.scores) for layer in units.values()])[:-1]
    parts = np.split(descend(scores, costs, budget), bounds)
    return {name: units[name].mask(part) for name, part in zip(units, parts, strict=True)}


def best_by_layer(
    units: Mapping[str, Units], prices: Mapping[str, int], budgets: Mapping[str, int], alive: bool
) -> Tensors:
    """Masks of the best units of each layer under its own budget.

    What is left of the budgets then goes round: in the order of what each layer has left, ties to the earlier,
    a layer gets the best of its units that still fits in what all have left, until nothing does.
    """
    scores = {name: _ranked(layer, alive) for name, layer in units.items()}
    costs = {name: layer.sizes * prices[name] for name, layer in units.items()}
    kept = {name: descend(scores[name], costs[name], budgets[name]) for name in units}
    rest = {name: budgets[name] - int(costs[name][kept[name]].sum()) for name in units}
    left = sum(rest.values())
    order = sorted(units, key=lambda name: -rest[name])
    given = True
    while given:
        given = False
        for name in order:
            fitting = np.flatnonzero(~kept[name] & (costs[name] <= left))
            if len(fitting):
                best = fitting[scores[name][fitting].argmax()]
                kept[name][best], given = True, True
                left -= int(costs[name][best])
    return {name: layer.mask(kept[name]) for name, layer in units.items()}


def descend(scores: _Floats, costs: _Ints, left: int) -> _Flags:
    """True at each unit that still fits when the ranking is gone down once; lower indices first among equals."""
    order = np.argsort(-scores, kind="stable")
    costs = costs[order]
    kept = np.zeros(len(order), np.bool_)
    ahead = np.arange(len(order))
    while len(ahead := ahead[costs[ahead] <= left]):
        spent = np.cumsum(costs[ahead])
        fit = int(np.searchsorted(spent, left, side="right"))
        kept[order[ahead[:fit]]] = True
        left -= int(spent[fit - 1])
        # The one that no longer fits is passed over; cheaper ones may follow.
        ahead = ahead[fit + 1 :]
    return kept


def _ranked(layer: Units, alive: bool) -> _Floats:
    scores = layer.scores.copy()
    if alive and len(scores):
        scores[scores.argmax()] = np.inf
    return scores
