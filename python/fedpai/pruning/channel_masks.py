# SPDX-License-Identifier: Apache-2.0
"""Masks of whole channels, through the whole network.

A channel's score is the sum over all weights of the layers that write it and of the layers that read it, divided
by their number. Every group of channels keeps at least one, or nothing would pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpai.pruning.allocation import Allocation, kept_count
from fedpai.pruning.channels import ChannelGroup, channel_groups
from fedpai.pruning.criteria import Layers
from fedpai.pruning.layers import Tensors
from fedpai.pruning.masks import Scores, check_budget, checked_score

_ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class _LayerCost:
    """What a layer costs: ``price`` for each kept output x kept input x tap.

    Attributes:
        price: of one output and one input with all taps.
        out, columns: how many there are.
        writes, reads: the groups they belong to, ``None`` where all stay.
        features: inputs for each channel read.
    """

    price: int
    out: int
    columns: int
    writes: int | None
    reads: int | None
    features: int

    def of(self, counts: Sequence[int]) -> int:
        """The cost when each group keeps so many channels."""
        out = self.out if self.writes is None else counts[self.writes]
        columns = self.columns if self.reads is None else counts[self.reads] * self.features
        return self.price * out * columns


class ChannelChooser:
    """Channels under a budget of weights or multiply-adds, never above it.

    ``"uniform"``: every group keeps the same share of its channels, rounded down but at least one, the largest share
    that the budget allows. ``"global"``: every group keeps its best channel. Then one ranking of all other channels
    is gone down once, and each that still fits is kept; under ``"uniform"``, at most one more in a group.

    Args:
        model: traced, not run.
        layers: its prunable layers.
        sparsity: share of the cost of all layers that goes.
        allocation: ``"global"`` or ``"uniform"``.
        prices: cost of one weight of each layer.

    Raises:
        ValueError: as :func:`channel_groups`; another allocation; a budget below one channel in every group.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        sparsity: float,
        allocation: Allocation,
        prices: Mapping[str, int],
    ) -> None:
        if allocation not in _ALLOCATIONS:
            raise ValueError(
                f"allocation: got {allocation!r}, expected one of {', '.join(_ALLOCATIONS)} for structure 'channel'"
            )
        self._layers, self._allocation, self._prices = layers, allocation, prices
        self._groups = channel_groups(model, layers)
        writes = {name: i for i, group in enumerate(self._groups) for name in group.writers}
        reads = {name: i for i, group in enumerate(self._groups) for name in group.readers}
        self._costs = {}
        for name, module in layers.items():
            out, columns = module.weight.shape[:2]
            taps = module.weight.shape[2:].numel()
            reader = reads.get(name)
            features = 1 if reader is None else self._groups[reader].readers[name]
            self._costs[name] = _LayerCost(
                prices[name] * taps, out, columns, writes.get(name), reader, features
            )
        self._sizes = [group.size for group in self._groups]
        self._whole = self._cost(self._sizes)
        self._budget = kept_count(self._whole, sparsity)
        least = self._cost([1] * len(self._groups))
        if self._budget < least:
            raise ValueError(
                f"sparsity: {sparsity} keeps {self._budget} of {self._whole}, less than the {least} of one channel "
                f"in each of {len(self._groups)} groups and the layers that keep theirs; lower it"
            )

    def masks(self, scores: Scores, within: Tensors | None = None, part: float = 1.0) -> Tensors:
        """As :class:`fedpai.pruning.choose.Chooser`."""
        means = [self._means(group, scores) for group in self._groups]
        if within:
            alive = (within[group.writers[0]].cpu().flatten(1).any(1) for group in self._groups)
            means = [mean.masked_fill(~kept, -torch.inf) for mean, kept in zip(means, alive, strict=True)]
        budget = self._budget
        if part < 1:
            budget = max(budget, round(self._whole ** (1 - part) * budget**part))
        return self._best(means, budget)

    def random(self, seed: int) -> Tensors:
        """One random number a channel."""
        generator = torch.Generator().manual_seed(seed)
        return self._best([torch.randn(size, generator=generator) for size in self._sizes], self._budget)

    def check(self, masks: Scores) -> None:
        """As :class:`fedpai.pruning.choose.Chooser`."""
        kept = [masks[group.writers[0]].flatten(1).any(1) for group in self._groups]
        for name in self._layers:
            if not torch.equal(masks[name], self._mask(name, kept)):
                raise ValueError(f"mask of {name} does not keep the channels of the layers around it")
        check_budget(masks, self._prices, self._budget)

    def _cost(self, counts: Sequence[int]) -> int:
        return sum(layer.of(counts) for layer in self._costs.values())

    def _means(self, group: ChannelGroup, scores: Scores) -> torch.Tensor:
        total = torch.zeros(group.size, dtype=torch.float64)
        weights = 0
        for name in group.writers:
            rows = self._score(name, scores).flatten(1)
            total += rows.sum(1)
            weights += rows.shape[1]
        for name in group.readers:
            columns = self._score(name, scores).transpose(0, 1).reshape(group.size, -1)
            total += columns.sum(1)
            weights += columns.shape[1]
        return total / weights

    def _score(self, name: str, scores: Scores) -> torch.Tensor:
        return checked_score(scores, name, self._layers).detach().to("cpu", torch.float64)

    def _best(self, means: Sequence[torch.Tensor], budget: int) -> Tensors:
        counts, most = [1] * len(means), self._sizes
        if self._allocation == "uniform":
            counts = self._uniform(budget)
            most = [count + 1 for count in counts]
        orders = [mean.argsort(descending=True, stable=True) for mean in means]
        ranking = sorted(
            (-score, group, place)
            for group, (mean, order) in enumerate(zip(means, orders, strict=True))
            for place, score in enumerate(mean[order].tolist())
            if score > -torch.inf
        )
        for _, group, place in ranking:
            # Others are kept already, or follow one of their group that did not fit.
            if place != counts[group] or place == most[group]:
                continue
            counts[group] += 1
            if self._cost(counts) > budget:
                counts[group] -= 1
        kept = []
        for order, count in zip(orders, counts, strict=True):
            flags = torch.zeros(len(order), dtype=torch.bool)
            flags[order[:count]] = True
            kept.append(flags)
        return {name: self._mask(name, kept) for name in self._layers}

    def _uniform(self, budget: int) -> list[int]:
        """Channels of each group under the largest common share that fits."""

        def counts(share: float) -> list[int]:
            return [max(1, int(share * size)) for size in self._sizes]

        low, high = 0.0, 1.0
        if self._cost(self._sizes) <= budget:
            return list(self._sizes)
        for _ in range(60):  # bisection, to the last bit
            middle = (low + high) / 2
            if self._cost(counts(middle)) <= budget:
                low = middle
            else:
                high = middle
        return counts(low)

    def _mask(self, name: str, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        cost, weight = self._costs[name], self._layers[name].weight
        rows = torch.ones(cost.out, dtype=torch.bool) if cost.writes is None else kept[cost.writes]
        columns = torch.ones(cost.columns, dtype=torch.bool)
        if cost.reads is not None:
            columns = kept[cost.reads].repeat_interleave(cost.features)
        mask = (rows[:, None] & columns).view(*weight.shape[:2], *[1] * (weight.dim() - 2))
        return mask.expand(weight.shape).contiguous().to(weight.device)
