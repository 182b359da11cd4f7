# SPDX-License-Identifier: Apache-2.0
"""Scores in one pass: random, magnitude, SNIP, GraSP. Higher always means keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpai.pruning.layers import Tensors

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Layers = dict[str, nn.Conv2d | nn.Linear]

GRASP_TEMPERATURE = 200.0
# A half of fewer images gives batch norm too little to normalise with.
GRASP_SMALLEST_HALF = 2


def random(layers: Layers, seed: int) -> Tensors:
    """Independent normal numbers from the seed, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(module.weight.shape, generator=generator).to(module.weight.device)
        for name, module in layers.items()
    }


def magnitude(layers: Layers) -> Tensors:
    """``|w|``."""
    return {name: module.weight.detach().abs() for name, module in layers.items()}


def snip(model: nn.Module, layers: Layers, batches: Sequence[Batch], loss: Loss) -> Tensors:
    """SNIP, connection sensitivity: ``|g w|`` divided by its sum (Lee, Ajanthan, Torr, arXiv 1810.02340).

    ``g`` is the gradient of the mean loss over all images, batch after batch; the absolute value is taken
    once, at the end. Batch norm uses batch statistics, as it will in training; dropout is off. The published
    code also prunes biases; here only weights are scored.
    """
    set_scoring_mode(model)
    weights = [module.weight for module in layers.values()]
    images = sum(len(x) for x, _ in batches)
    gradient = [torch.zeros_like(weight) for weight in weights]
    for x, y in batches:
        value = loss(model(x), y)
        for total, part in zip(gradient, _gradients(value, weights), strict=True):
            total.add_(part, alpha=len(x) / images)
    return _by_name(layers, [(g * w.detach()).abs() for g, w in zip(gradient, weights, strict=True)])


def grasp(model: nn.Module, layers: Layers, batches: Sequence[Batch], loss: Loss) -> Tensors:
    """GraSP, preservation of gradient flow: ``w (H g)`` divided by the sum of its absolute values (Wang,
    Zhang, Grosse, arXiv 2002.07376).

    The published score is ``S = -w (H g)`` and drops the highest; this is ``-S``, so that higher means keep.
    Logits are divided by T = 200. Each batch is cut into two halves, ``g`` is the sum of the halves'
    gradients, and ``H g`` the sum over halves of the gradient of ``<g, gradient of the half's loss>`` by a
    second backward pass. A batch of fewer than four images is not cut. Batch norm uses batch statistics;
    dropout is off. Linear layers keep their weights (the published code draws them anew before scoring).
    """
    set_scoring_mode(model)
    weights = [module.weight for module in layers.values()]
    gradient = [torch.zeros_like(weight) for weight in weights]
    for x, y in _halves(batches):
        value = loss(model(x) / GRASP_TEMPERATURE, y)
        for total, part in zip(gradient, _gradients(value, weights), strict=True):
            total.add_(part)
    product = [torch.zeros_like(weight) for weight in weights]
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        for x, y in _halves(batches):
            value = loss(model(x) / GRASP_TEMPERATURE, y)
            flow = torch.stack(
                [
                    torch.sum(g * part)
                    for g, part in zip(gradient, _gradients(value, weights, create_graph=True), strict=True)
                ]
            ).sum()
            for total, part in zip(product, _gradients(flow, weights), strict=True):
                total.add_(part)
    return _by_name(layers, [w.detach() * hg for w, hg in zip(weights, product, strict=True)])


def set_scoring_mode(model: nn.Module) -> None:
    """Train mode, except for dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def normalised(scores: Tensors, what: str) -> Tensors:
    """Divide by the sum of absolute values over all layers, taken in float64.

    Raises:
        ValueError: the sum is zero, so that nothing can be ranked.
    """
    total = absolute_sum(scores)
    if total == 0:
        raise ValueError(f"scores: {what} gives 0 for every weight, nothing can be ranked")
    return {name: score / total for name, score in scores.items()}


def absolute_sum(scores: Tensors) -> float:
    """Sum of absolute values over all layers, in float64; not finite if any score is not."""
    return sum(score.abs().sum(dtype=torch.float64).item() for score in scores.values())


def _halves(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Each batch in two halves, where both are large enough."""
    for x, y in batches:
        half = len(x) // 2
        if half < GRASP_SMALLEST_HALF:
            yield x, y
        else:
            yield x[:half], y[:half]
            yield x[half:], y[half:]


def _gradients(
    value: torch.Tensor, weights: Sequence[torch.Tensor], create_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """Gradients of a scalar; zeros for a weight that it does not depend on."""
    return torch.autograd.grad(value, weights, create_graph=create_graph, materialize_grads=True)


def _by_name(layers: Layers, values: Sequence[torch.Tensor]) -> Tensors:
    return dict(zip(layers, values, strict=True))
