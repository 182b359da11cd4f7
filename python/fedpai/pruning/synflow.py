# SPDX-License-Identifier: Apache-2.0
"""SynFlow, iterative synaptic flow pruning without data (Tanaka, Kunin, Yamins, Ganguli, arXiv 2006.05467).

Score of a weight: ``|w dR/dw|``, where R is the sum of the network's outputs for an all-ones input after
every parameter is replaced by its absolute value. After step t of n the weights with the highest scores make
up ``rho^(t/n)`` of all, rho the final density; then the survivors are scored anew.

Batch norm is in eval mode with its running mean taken as 0: a positive factor ``|gamma| / sqrt(var + eps)``
and a shift ``|beta|`` a channel. At initialisation that is the identity, as in the published code. Layer norm
subtracts the mean of its input, so that R is no sum over positive paths: transformers are refused.

Range: R multiplies the weight sums of all layers, about 1e28 for ResNet-18. Passes run in float32 while R is
well inside its range and in float64 otherwise; scores are then divided by their sum. (Rescaling single layers
instead would change the ranking where a shortcut runs beside the rescaled branch.)
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpai.pruning.choose import Chooser
from fedpai.pruning.criteria import Layers, absolute_sum
from fedpai.pruning.layers import Shape, Tensors

ITERATIONS = 100
# Within these bounds every activation, gradient and score of a float32 pass stays a normal number.
SMALLEST_FLOW, LARGEST_FLOW = 1e-24, 1e34


class SynFlow:
    """Scores of one model under changing masks.

    Args:
        model: a scoring copy; it is changed for good.
        layers: its prunable layers.
        input_shape: of one input, without the batch.
    """

    def __init__(self, model: nn.Module, layers: Layers, input_shape: Shape) -> None:
        self._shape = (1, *input_shape)
        _linearise(model)
        self._variants = {torch.float32: (model.float(), layers)}
        self._dtype = torch.float32
        self._magnitudes = {name: module.weight.detach().clone() for name, module in layers.items()}

    def scores(self, masks: Tensors | None = None) -> Tensors:
        """float32 scores that add up to 1, zero outside the masks.

        Raises:
            ValueError: no path from input to output is left, or R is not finite even in float64.
        """
        flow, raw = self._pass(self._dtype, masks)
        total = absolute_sum(raw)
        if self._dtype == torch.float32 and not (_fits_float32(flow) and math.isfinite(total)):
            flow, raw = self._pass(torch.float64, masks)
            total = absolute_sum(raw)
        if flow == 0:
            kept = sum(int(mask.sum()) for mask in masks.values()) if masks else "all"
            raise ValueError(
                f"synflow: with {kept} weights kept no path from input to output is left; lower the sparsity"
            )
        if not (0 < flow < math.inf and 0 < total < math.inf):
            raise ValueError(
                f"synflow: outputs add up to {flow}, scores to {total}; expected finite positive sums"
            )
        # R shrinks as weights go: a network that begins in float64 may go on in float32.
        self._dtype = torch.float32 if _fits_float32(flow) else torch.float64
        return {name: (score / total).float() for name, score in raw.items()}

    def _pass(self, dtype: torch.dtype, masks: Tensors | None) -> tuple[float, Tensors]:
        """R and ``|w dR/dw|`` in one precision."""
        if dtype not in self._variants:
            model, layers = copy.deepcopy(self._variants[torch.float32])
            self._variants[dtype] = model.to(dtype), layers
        model, layers = self._variants[dtype]
        weights = [module.weight for module in layers.values()]
        with torch.no_grad():
            for name, weight in zip(layers, weights, strict=True):
                weight.copy_(self._magnitudes[name])
                if masks is not None:
                    weight.mul_(masks[name])
        flow = model(torch.ones(self._shape, dtype=dtype, device=weights[0].device)).sum()
        gradients = torch.autograd.grad(flow, weights, materialize_grads=True)
        raw = [(g * w.detach()).abs_() for g, w in zip(gradients, weights, strict=True)]
        return flow.item(), dict(zip(layers, raw, strict=True))


def synflow_masks(
    model: nn.Module, layers: Layers, input_shape: Shape, chooser: Chooser, iterations: int = ITERATIONS
) -> Tensors:
    """Score, prune a little, score the survivors, ``iterations`` times.

    Args:
        model, layers, input_shape: as for :class:`SynFlow`.
        chooser: makes masks of the scores, on the geometric way from all weights to its budget.
        iterations: at least 1.
    """
    flow = SynFlow(model, layers, input_shape)
    masks: Tensors | None = None
    for step in range(1, iterations + 1):
        masks = chooser.masks(flow.scores(masks), masks, step / iterations)
    if masks is None:
        raise ValueError(f"iterations: got {iterations}, expected at least 1")
    return masks


def first_layer_norm(model: nn.Module) -> str | None:
    """The name of a layer norm, with which a network has no synaptic flow; None without one."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)), None)


def _fits_float32(flow: float) -> bool:
    return SMALLEST_FLOW < flow < LARGEST_FLOW


def _linearise(model: nn.Module) -> None:
    """Absolute values, eval mode, batch norm as a positive factor and shift.

    Raises:
        ValueError: a layer norm.
    """
    name = first_layer_norm(model)
    if name is not None:
        raise ValueError(f"synflow: {name} is a LayerNorm, whose outputs are no sums over positive paths")
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is None or module.running_var is None:
                    # Without running statistics eval mode would still normalise by the batch.
                    module.running_mean = torch.zeros(module.num_features, device=device)
                    module.running_var = torch.ones(module.num_features, device=device)
                module.running_mean.zero_()
