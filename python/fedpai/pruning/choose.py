# SPDX-License-Identifier: Apache-2.0
"""From scores to masks, for every structure and kind of budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fedpai.pruning import cost, criteria
from fedpai.pruning.allocation import (
    PRICED,
    Allocation,
    Prices,
    allocate,
    checked_count,
    kept_count,
    parse_allocation,
    shares,
)
from fedpai.pruning.channel_masks import ChannelChooser
from fedpai.pruning.criteria import Layers
from fedpai.pruning.layers import Exclude, Shape, Tensors, prunable_layers
from fedpai.pruning.masks import (
    Scores,
    check_budget,
    checked_score,
    masks_from_counts,
    masks_from_scores,
    resolve_allocation,
)
from fedpai.pruning.units import best_by_layer, best_together, cut_layer
from fedpai_kernels.structure import Block, Channel, FanIn, NOfM, Structure, Unstructured, grouped, parse

BUDGETS = ("weights", "flops")
"""What a sparsity is a share of: the weights, or the multiply-adds of the forward pass of one image."""

# How far a sparsity may be from 1 - N / M: 0.667 says 1:3.
_N_OF_M_ROUNDING = 1e-3


class Chooser(Protocol):
    """Makes masks within a budget that was checked when it was made."""

    def masks(self, scores: Scores, within: Tensors | None = None, part: float = 1.0) -> Tensors:
        """Masks of the best.

        Args:
            scores: one finite number a weight; higher = keep.
            within: earlier masks of this chooser; nothing they drop comes back.
            part: how much of the geometric way from the whole network to the budget, in (0, 1].
        """

    def random(self, seed: int) -> Tensors:
        """Masks from one random number for all that is kept or dropped together."""

    def check(self, masks: Scores) -> None:
        """Raises a ValueError unless such masks may be this chooser's: of its structure and within its budget."""


def chooser(
    model: nn.Module,
    sparsity: float,
    *,
    scope: str | None = None,
    allocation: Allocation | None = None,
    structure: str = "weight",
    budget: str = "weights",
    exclude: Exclude | None = None,
    keep_layers_alive: bool = True,
    input_shape: Shape | None = None,
) -> Chooser:
    """What makes masks of this model's scores; the arguments are those of :func:`fedpai.pruning.prune`.

    Raises:
        ValueError: an unknown structure, budget or allocation, a pair of them that cannot be, a block or an M
            larger than every layer, or a sparsity that the structure cannot have.
    """
    kind = parse(structure)
    if budget not in BUDGETS:
        raise ValueError(f"budget: got {budget!r}, expected one of {', '.join(BUDGETS)}")
    chosen = resolve_allocation(scope, allocation)
    name = parse_allocation(chosen)[0] if isinstance(chosen, str) else "counts"
    if budget == "flops" and name in ("counts", "time"):
        raise ValueError(
            f"allocation: {name} are of weights, expected a name with budget 'flops'"
            if name == "counts"
            else f"allocation: {chosen!r} shares out weights, expected another one with budget 'flops'"
        )
    layers = prunable_layers(model, exclude)
    if isinstance(kind, NOfM):
        return _NOfMChooser(layers, sparsity, kind, chosen if scope or allocation else "uniform")
    spent = dict.fromkeys(layers, 1)  # of the budget, by one weight
    if budget == "flops":
        spent = cost.positions(model, layers, input_shape)
    if isinstance(kind, Channel):
        return ChannelChooser(model, layers, sparsity, chosen, spent)
    prices: Prices | None = None
    if name in PRICED:
        find = cost.positions if name == "flops" else cost.nanoseconds
        prices = find(model, layers, input_shape)
    if budget == "weights" and isinstance(kind, Unstructured):
        return _WeightChooser(layers, sparsity, chosen, prices, keep_layers_alive)
    return _UnitChooser(layers, sparsity, chosen, prices, kind, spent, keep_layers_alive)


def structured_masks(
    model: nn.Module,
    scores: Scores,
    sparsity: float,
    *,
    scope: str | None = None,
    allocation: Allocation | None = None,
    structure: str = "weight",
    budget: str = "weights",
    keep_layers_alive: bool = True,
    input_shape: Shape | None = None,
) -> Tensors:
    """Masks of one model's scores, as :func:`fedpai.pruning.prune` makes them; layers without scores get none.

    Raises:
        ValueError: as :func:`chooser`; scores of layers the model does not have or that are not finite.
    """
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    if unknown := sorted(set(scores) - known):
        raise ValueError(f"scores: no convolution or linear layer is called {', '.join(unknown)}")
    return chooser(
        model,
        sparsity,
        scope=scope,
        allocation=allocation,
        structure=structure,
        budget=budget,
        exclude=lambda name, _: name not in scores,
        keep_layers_alive=keep_layers_alive,
        input_shape=input_shape,
    ).masks(scores)


def _numels(layers: Layers) -> dict[str, int]:
    return {name: module.weight.numel() for name, module in layers.items()}


def _shapes(layers: Layers) -> dict[str, tuple[int, ...]]:
    return {name: tuple(module.weight.shape) for name, module in layers.items()}


def _towards(final: int, size: int, part: float) -> int:
    """The count on the geometric way from ``size`` to ``final``; never rises as ``part`` does."""
    return final if part == 1 else max(final, round(size ** (1 - part) * final**part))


class _WeightChooser:
    """Single weights, counted."""

    def __init__(
        self, layers: Layers, sparsity: float, allocation: Allocation, prices: Prices | None, alive: bool
    ) -> None:
        self._layers, self._sparsity, self._alive = layers, sparsity, alive
        self._whole = sum(_numels(layers).values())
        checked_count(_shapes(layers), sparsity, alive)
        self._counts: dict[str, int] | None = None
        if allocation != "global":
            self._counts = allocate(
                _shapes(layers), sparsity, allocation, keep_layers_alive=alive, prices=prices
            )

    def masks(self, scores: Scores, within: Tensors | None = None, part: float = 1.0) -> Tensors:
        if self._counts is not None:
            now = {n: _towards(self._counts[n], score.numel(), part) for n, score in scores.items()}
            return masks_from_counts(scores, now, within)
        # The last step takes the sparsity itself: 1 - (1 - s) may round to another count.
        gone = self._sparsity if part == 1 else 1 - (1 - self._sparsity) ** part
        return masks_from_scores(scores, gone, keep_layers_alive=self._alive, within=within)

    def random(self, seed: int) -> Tensors:
        return self.masks(criteria.random(self._layers, seed))

    def check(self, masks: Scores) -> None:
        kept = sum(int(mask.sum()) for mask in masks.values())
        wanted = kept_count(self._whole, self._sparsity)
        if kept != wanted:
            raise ValueError(f"mask keeps {kept} weights, the agreed sparsity keeps {wanted}")
        for name, count in (self._counts or {}).items():
            if (found := int(masks[name].sum())) != count:
                raise ValueError(f"mask of {name} keeps {found} weights, the agreed allocation {count}")


class _UnitChooser:
    """Blocks, equal fan-in, or single weights, counted or weighed by their multiply-adds."""

    def __init__(
        self,
        layers: Layers,
        sparsity: float,
        allocation: Allocation,
        prices: Prices | None,
        structure: Structure,
        spent: Mapping[str, int],
        alive: bool,
    ) -> None:
        self._layers, self._spent, self._alive = layers, spent, alive
        kind = structure if isinstance(structure, Block | FanIn) else None
        if isinstance(kind, Block):
            _check_fits(layers, kind)
        self._cuts = {
            name: cut_layer(module.weight.shape, kind, getattr(module, "groups", 1))
            for name, module in layers.items()
        }
        costs = {name: numel * spent[name] for name, numel in _numels(layers).items()}
        self._whole = sum(costs.values())
        self._budget = kept_count(self._whole, sparsity)
        largest = {name: cut.largest * spent[name] for name, cut in self._cuts.items()}
        smallest = min(cut.smallest * spent[name] for name, cut in self._cuts.items())
        least = sum(largest.values()) if alive else smallest
        if self._budget < least:
            raise ValueError(
                f"sparsity: {sparsity} keeps {self._budget} of {self._whole}, less than the {least} of "
                f"{f'one unit in each of {len(layers)} layers' if alive else 'the smallest unit'} of structure "
                f"{structure}; lower it{', or allow empty layers with keep_layers_alive=False' if alive else ''}"
            )
        self._budgets: dict[str, int] | None = None
        if allocation != "global":
            floors = largest if alive else dict.fromkeys(layers, 0)
            self._budgets = shares(_shapes(layers), allocation, costs, self._budget, floors, prices)
        self._costs = costs

    def masks(self, scores: Scores, within: Tensors | None = None, part: float = 1.0) -> Tensors:
        units = {}
        for name, cut in self._cuts.items():
            score = checked_score(scores, name, self._layers)
            units[name] = cut.units(score, within[name] if within else None)
        if self._budgets is None:
            now = _towards(self._budget, self._whole, part)
            return best_together(units, self._spent, now, self._alive)
        each = {name: _towards(self._budgets[name], self._costs[name], part) for name in units}
        return best_by_layer(units, self._spent, each, self._alive)

    def random(self, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        scores = {name: cut.random(generator) for name, cut in self._cuts.items()}
        return self.masks(
            {name: score.to(self._layers[name].weight.device) for name, score in scores.items()}
        )

    def check(self, masks: Scores) -> None:
        for name, mask in masks.items():
            try:
                self._cuts[name].check(mask)
            except ValueError as error:
                raise ValueError(f"mask of {name}: {error}") from None
        check_budget(masks, self._spent, self._budget)


def _check_fits(layers: Layers, block: Block) -> None:
    """A whole block must fit some layer; layers smaller than it are all edge."""
    sides = [
        (module.weight.shape[0] // getattr(module, "groups", 1), module.weight.shape[1])
        for module in layers.values()
    ]
    if not any(rows >= block.rows and columns >= block.columns for rows, columns in sides):
        raise ValueError(
            f"structure: a block of {block.rows}x{block.columns} is larger than every layer; the largest has "
            "{0[0]} output and {0[1]} input channels per group".format(max(sides, key=np.prod))
        )


class _NOfMChooser:
    """The best N of each M consecutive input channels; of a shorter last run of them, N / M, rounded up."""

    def __init__(self, layers: Layers, sparsity: float, structure: NOfM, allocation: Allocation) -> None:
        self._layers, self._n, self._m = layers, structure.n, structure.m
        if allocation != "uniform":
            raise ValueError(
                f"allocation: got {allocation!r}, but structure {structure} keeps the same share of every layer; "
                "expected 'uniform' or none"
            )
        fixed = 1 - structure.n / structure.m
        if not abs(sparsity - fixed) <= _N_OF_M_ROUNDING:
            raise ValueError(
                f"sparsity: got {sparsity}, but structure {structure} removes {fixed:.4g} of the weights; "
                "expected that"
            )
        widest = max(module.weight.shape[1] for module in layers.values())
        if structure.m > widest:
            raise ValueError(
                f"structure: {structure} is wider than every layer; the widest has {widest} input channels per group"
            )

    def masks(self, scores: Scores, within: Tensors | None = None, part: float = 1.0) -> Tensors:
        n = int(np.ceil(self._m * (self._n / self._m) ** part)) if part < 1 else self._n
        made = {}
        for name in self._layers:
            score = checked_score(scores, name, self._layers).detach()
            if within:
                score = score.masked_fill(~within[name], -torch.inf)
            made[name] = self._best(grouped(score), n).view(score.shape)
        return made

    def random(self, seed: int) -> Tensors:
        return self.masks(criteria.random(self._layers, seed))

    def check(self, masks: Scores) -> None:
        for name, mask in masks.items():
            if not torch.equal(mask, self._best(grouped(mask.float()), self._n).view(mask.shape) & mask):
                raise ValueError(f"mask of {name} keeps more than {self._n} of {self._m}")

    def _best(self, scores: torch.Tensor, n: int) -> torch.Tensor:
        """Flags of (groups, out, in, taps), at most ``n`` in a run."""
        columns = scores.shape[2]
        ragged = -columns % self._m
        padded = torch.nn.functional.pad(scores, (0, 0, 0, ragged), value=-torch.inf)
        runs = padded.unflatten(2, (-1, self._m))
        counts = torch.full((runs.shape[2], 1, 1), n, device=scores.device)
        counts[-1] = -(-n * (self._m - ragged) // self._m)
        best = torch.arange(self._m, device=scores.device)[:, None] < counts
        order = runs.argsort(dim=3, descending=True, stable=True)
        kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(3, order, best.expand_as(order))
        return kept.flatten(2, 3)[:, :, :columns].contiguous()
