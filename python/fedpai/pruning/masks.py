# SPDX-License-Identifier: Apache-2.0
"""From scores to masks of an exact size, and from many clients' scores to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedpai.pruning.allocation import Allocation, allocate, budget
from fedpai.pruning.layers import Tensors

Scores = Mapping[str, torch.Tensor]
_Values = npt.NDArray[np.floating]


def resolve_allocation(scope: str | None, allocation: Allocation | None) -> Allocation:
    """``scope`` and ``allocation`` as one choice: ``"global"``, ``"uniform"``, ``"erk"`` or counts.

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

    Equal scores: the earlier layer, then the lower row-major index, wins. With ``keep_layers_alive`` every
        layer
    keeps at least its best weight; the worst of the others make room, so the total stays exact.

    Args:
        scores: one finite floating-point tensor a layer, of its weight's shape; higher = keep.
        sparsity: share of all weights that goes, in [0, 1).
        scope: ``"global"``, one ranking over all layers (default), or ``"layer"``, fixed counts a layer.
        allocation: the counts: ``"uniform"`` (default of scope ``"layer"``), ``"erk"``, or
            ``{layer name: count}``; ``"global"`` is the same as scope ``"global"``.
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
    flat = {name: _values(name, score, within) for name, score in scores.items()}
    chosen = resolve_allocation(scope, allocation)
    if chosen == "global":
        kept = budget(shapes, sparsity, keep_layers_alive)
        if keep_layers_alive:
            for values in flat.values():
                values[values.argmax()] = np.inf
        everything = _keep_highest(np.concatenate(list(flat.values())), kept, "all layers together")
        bounds = np.cumsum([len(values) for values in flat.values()])[:-1]
        parts = dict(zip(flat, np.split(everything, bounds), strict=True))
    else:
        counts = allocate(shapes, sparsity, chosen, keep_layers_alive=keep_layers_alive)
        parts = {name: _keep_highest(values, counts[name], name) for name, values in flat.items()}
    return _as_masks(parts, scores)


def masks_from_counts(scores: Scores, counts: Mapping[str, int], within: Scores | None = None) -> Tensors:
    """Keep the ``counts[name]`` highest scores of each layer; otherwise as :func:`masks_from_scores`."""
    return _as_masks(
        {name: _keep_highest(_values(name, s, within), counts[name], name) for name, s in scores.items()},
        scores,
    )


def _as_masks(parts: Mapping[str, npt.NDArray[np.bool_]], scores: Scores) -> Tensors:
    """Flat arrays as tensors of the scores' shapes and devices."""
    return {
        name: torch.from_numpy(part.copy()).view(scores[name].shape).to(scores[name].device)
        for name, part in parts.items()
    }


def _values(name: str, score: torch.Tensor, within: Scores | None) -> _Values:
    """A checked flat copy of one layer's scores; minus infinity where the weight may not be kept."""
    if not score.is_floating_point() or score.numel() == 0:
        raise ValueError(
            f"scores: {name} is {score.dtype} {tuple(score.shape)}, expected floating-point scores"
        )
    check_finite(name, score)
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    values: _Values = score.detach().to("cpu", dtype, copy=True).contiguous().numpy().ravel()
    if within is not None:
        mask = within.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != score.shape:
            found = "nothing" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"within: {name} is {found}, expected torch.bool {tuple(score.shape)}")
        values[~mask.detach().cpu().contiguous().numpy().ravel()] = -np.inf
    return values


def check_finite(name: str, score: torch.Tensor) -> None:
    """Raise a ValueError that names the layer unless all its scores are finite."""
    bad = int((~torch.isfinite(score)).sum())
    if bad:
        raise ValueError(f"scores: {name} has {bad} of {score.numel()} scores that are NaN or infinite")


def _keep_highest(values: _Values, count: int, what: str) -> npt.NDArray[np.bool_]:
    """True at the ``count`` highest values, lower indices first among equals."""
    available = int(np.count_nonzero(values > -np.inf))
    if count > available:
        raise ValueError(f"within: {what} has {available} weights left, {count} were asked for")
    if count == 0:
        return np.zeros(len(values), np.bool_)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    keep = values > threshold
    keep[np.flatnonzero(values == threshold)[: count - int(np.count_nonzero(keep))]] = True
    return keep


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
