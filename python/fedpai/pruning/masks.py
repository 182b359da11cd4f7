# SPDX-License-Identifier: Apache-2.0
"""From scores to masks of an exact size, and from many clients' scores to one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedpai.pruning.allocation import Allocation, allocate, checked_count
from fedpai.pruning.criteria import Layers
from fedpai.pruning.layers import Tensors

Scores = Mapping[str, torch.Tensor]
_Values = npt.NDArray[np.floating]


def resolve_allocation(scope: str | None, allocation: Allocation | None) -> Allocation:
    """``scope`` and ``allocation`` as one choice: a name of :func:`allocate`, ``"global"`` or counts.

    ``scope="global"`` means ``allocation="global"``; ``scope="layer"`` means counts fixed per layer, uniform
    unless ``allocation`` says which. Neither given: global.

    Raises:
        ValueError: an unknown scope, or a pair that contradicts itself.
    """
    if scope not in (None, "global", "layer"):
        raise ValueError(f"scope: got {scope!r}, expected 'global' or 'layer'")
    if allocation is None:
        return "uniform" if scope == "layer" else "global"
    if scope is not None and (scope == "global") != (allocation == "global"):
        raise ValueError(f"scope: {scope!r} contradicts allocation {allocation!r}")
    return allocation


def masks_from_scores(
    scores: Scores,
    sparsity: float,
    scope: str | None = None,
    *,
    allocation: Allocation | None = None,
    keep_layers_alive: bool = True,
    within: Scores | None = None,
) -> Tensors:
    """Keep the weights with the highest scores, exactly ``round((1 - sparsity) * total)`` of them.

    Equal scores: the earlier layer, then the lower row-major index, wins. With ``keep_layers_alive`` every layer
    keeps at least its best weight; the worst of the others make room, so the total stays exact.

    Args:
        scores: one finite floating-point tensor a layer, of its weight's shape; higher = keep.
        sparsity: share of all weights that goes, in [0, 1).
        scope: ``"global"``, one ranking over all layers (default), or ``"layer"``, fixed counts a layer.
        allocation: the counts: ``"uniform"`` (default of scope ``"layer"``), ``"erk"``, or
            ``{layer name: count}``; ``"global"`` is the same as scope ``"global"``. ``"flops"`` and ``"time"`` need
            the model: :func:`fedpai.pruning.structured_masks`.
        keep_layers_alive: no layer is emptied.
        within: masks; only their weights may be kept (pruning further what is pruned already).

    Returns:
        ``{layer name: bool tensor}``, on the scores' devices, in the scores' order.

    Raises:
        ValueError: no scores, scores that are not floating point or not finite (naming the layer), an
            impossible budget or allocation, ``within`` that does not fit.
    """
    if not scores:
        raise ValueError("scores: got none")
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    chosen = resolve_allocation(scope, allocation)
    if chosen != "global":
        counts = allocate(shapes, sparsity, chosen, keep_layers_alive=keep_layers_alive)
        return masks_from_counts(scores, counts, within)
    candidates = {name: _Candidates.of(name, score, within) for name, score in scores.items()}
    kept = checked_count(shapes, sparsity, keep_layers_alive)
    if keep_layers_alive:
        for name, layer in candidates.items():
            if len(layer.values) == 0:
                raise ValueError(f"within: {name} has no weights left")
            layer.values[layer.values.argmax()] = np.inf
    together = np.concatenate([layer.values for layer in candidates.values()])
    bounds = np.cumsum([len(layer.values) for layer in candidates.values()])[:-1]
    parts = np.split(_highest(together, kept, "all layers together"), bounds)
    return {name: candidates[name].mask(part) for name, part in zip(candidates, parts, strict=True)}


def masks_from_counts(scores: Scores, counts: Mapping[str, int], within: Scores | None = None) -> Tensors:
    """Keep the ``counts[name]`` highest scores of each layer; otherwise as :func:`masks_from_scores`."""
    masks = {}
    for name, score in scores.items():
        layer = _Candidates.of(name, score, within)
        masks[name] = layer.mask(_highest(layer.values, counts[name], name))
    return masks


@dataclass(frozen=True)
class _Candidates:
    """The weights of one layer that may be kept: their scores, and where they are (``None``: all of them)."""

    score: torch.Tensor
    values: _Values
    positions: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, name: str, score: torch.Tensor, within: Scores | None) -> _Candidates:
        """Checked, and copied: the values may be written to."""
        if not score.is_floating_point() or score.numel() == 0:
            found = f"{score.dtype} {tuple(score.shape)}"
            raise ValueError(f"scores: {name} is {found}, expected floating-point scores")
        check_finite(name, score)
        dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
        values: _Values = score.detach().to("cpu", dtype, copy=True).contiguous().numpy().ravel()
        if within is None:
            return cls(score, values, None)
        mask = within.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != score.shape:
            found = "nothing" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"within: {name} is {found}, expected torch.bool {tuple(score.shape)}")
        positions = np.flatnonzero(mask.detach().cpu().numpy())
        return cls(score, values[positions], positions)

    def mask(self, keep: npt.NDArray[np.bool_]) -> torch.Tensor:
        """A mask of the layer's shape from one flag a candidate."""
        full = np.zeros(self.score.numel(), np.bool_)
        full[slice(None) if self.positions is None else self.positions] = keep
        return torch.from_numpy(full).view(self.score.shape).to(self.score.device)


def _highest(values: _Values, count: int, what: str) -> npt.NDArray[np.bool_]:
    """True at the ``count`` highest values, lower indices first among equals."""
    if count > len(values):
        raise ValueError(f"within: {what} has {len(values)} weights left, {count} were asked for")
    if count == 0:
        return np.zeros(len(values), np.bool_)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    keep = values > threshold
    keep[np.flatnonzero(values == threshold)[: count - int(np.count_nonzero(keep))]] = True
    return keep


def check_finite(name: str, score: torch.Tensor) -> None:
    """Raise a ValueError that names the layer unless all its scores are finite."""
    # One cheap pass in the usual case: a NaN or an infinity survives the sum.
    if math.isfinite(score.sum(dtype=torch.float64).item()):
        return
    bad = int((~torch.isfinite(score)).sum())
    if bad:
        raise ValueError(f"scores: {name} has {bad} of {score.numel()} scores that are NaN or infinite")


def checked_score(scores: Scores, name: str, layers: Layers) -> torch.Tensor:
    """The scores of one layer.

    Raises:
        ValueError: they are missing, of another shape, not floating point or not finite.
    """
    score, shape = scores.get(name), layers[name].weight.shape
    if score is None or not score.is_floating_point() or score.shape != shape:
        found = "missing" if score is None else f"{score.dtype} {tuple(score.shape)}"
        raise ValueError(f"scores: {name} is {found}, expected floating-point scores {tuple(shape)}")
    check_finite(name, score)
    return score


def check_budget(masks: Scores, prices: Mapping[str, int], budget: int) -> None:
    """Raises a ValueError if masks cost more than the budget, at these prices of a weight."""
    kept = sum(int(mask.sum()) * prices[name] for name, mask in masks.items())
    if kept > budget:
        raise ValueError(f"mask keeps {kept}, the agreed sparsity at most {budget}")


def average_scores(clients: Sequence[Scores], weights: Sequence[float] | None = None) -> Tensors:
    """Mean of several clients' scores, weight by weight; what a server ranks to give everybody one mask.

    SNIP and GraSP scores come with absolute values that add up to 1, so clients count by ``weights`` and not
    by the size of their gradients. (The form of SSFL, arXiv 2405.09037.)

    Args:
        clients: scores of the same model, at least one.
        weights: one non-negative number a client, usually its number of images; ``None`` counts all alike.

    Returns:
        float32 scores; sums are taken in float64, in the clients' order.

    Raises:
        ValueError: no clients, layers or shapes that differ, scores that are not finite, bad weights.
    """
    if not clients:
        raise ValueError("clients: got no scores to average")
    factors = [1.0] * len(clients) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(clients):
        raise ValueError(f"weights: got {len(factors)}, expected one for each of {len(clients)} clients")
    total = sum(factors)
    if not all(0 <= factor < float("inf") for factor in factors) or total <= 0:
        raise ValueError(f"weights: got {factors}, expected finite numbers >= 0, not all 0")
    shapes = {name: score.shape for name, score in clients[0].items()}
    for position, client in enumerate(clients):
        if {name: score.shape for name, score in client.items()} != shapes:
            raise ValueError(f"clients: scores {position} have other layers or shapes than scores 0")
        for name, score in client.items():
            check_finite(f"client {position}, {name}", score)
    average = {}
    for name, shape in shapes.items():
        accumulator = torch.zeros(shape, dtype=torch.float64, device=clients[0][name].device)
        for client, factor in zip(clients, factors, strict=True):
            accumulator.add_(client[name], alpha=factor / total)
        average[name] = accumulator.float()
    return average
