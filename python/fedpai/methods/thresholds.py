# SPDX-License-Identifier: Apache-2.0
"""Trainable thresholds that switch whole filters and neurons off (SpaFL, arXiv 2406.00431).

    mu_i = mean_j |w_ij|        m_i = 1 where mu_i - tau_i > 0, else 0        the layer computes with m_i w_ij

Backward, with G_ij = dL/d(m_i w_ij) * w_ij and the step's gradient taken as 1 everywhere (straight-through):

    dL/dtau_i = -sum_j G_ij        dL/dw_ij = m_i dL/d(m_i w_ij) + sign(w_ij) / n_in * sum_l G_il
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpai.federation.layout import Floats, Layout, module_of

COLLAPSED = 0.01
"""A layer that would keep at most this share of its filters starts anew, all thresholds at 0."""


class _Step(torch.autograd.Function):
    """1 where the input is positive, else 0; the gradient passes as through the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Threshold(nn.Module):
    """Turns a weight w into m w; a parametrisation of the layer's weight.

    Args:
        values: tau, (out,); trained together with the weight.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        """(out, ...) to the same shape, whole filters at 0."""
        mean = weight.abs().flatten(1).mean(1)
        with torch.no_grad():
            if (mean > self.values).double().mean() <= COLLAPSED:
                self.values.zero_()
        keep = _Step.apply(mean - self.values)
        return weight * keep.view(-1, *[1] * (weight.dim() - 1))


@contextmanager
def thresholded(model: nn.Module, layout: Layout, values: Floats) -> Iterator[list[Threshold]]:
    """A dense model with thresholds on all its conv and linear weights for the length of a block.

    The weights stay the same parameters; the thresholds become parameters beside them.

    Args:
        values: (layout.channel_count,) float32, layer after layer; copied.
    """
    layers = [model.get_submodule(module_of(slot)) for slot in layout.weights]
    thresholds = [Threshold(torch.from_numpy(part.copy())) for part in by_layer(layout, values)]
    try:
        for layer, threshold in zip(layers, thresholds, strict=True):
            parametrize.register_parametrization(layer, "weight", threshold)
        yield thresholds
    finally:
        for layer in layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def read(thresholds: list[Threshold]) -> Floats:
    """The values of all layers as one vector."""
    return np.concatenate([threshold.values.detach().numpy() for threshold in thresholds])


@torch.no_grad()
def masked(layout: Layout, floats: Floats, values: Floats) -> Floats:
    """A dense model's vector with the filters at 0 that its thresholds switch off."""
    floats = floats.copy()
    for slot, part in zip(layout.weights, by_layer(layout, values), strict=True):
        weight = torch.from_numpy(floats[slot.offset : slot.stop]).view(slot.shape)
        weight.copy_(Threshold(torch.from_numpy(part.copy()))(weight))
    return floats


def follow(layout: Layout, floats: Floats, change: Floats) -> Floats:
    """Moves weights as their thresholds moved: w_ij - change_i sign(sum_j w_ij) / D.

    D is the kernel's area for a convolution (without its input channels) and the fan-in for a linear layer.

    Args:
        floats: a dense model's vector.
        change: (layout.channel_count,), by how much each threshold grew.
    """
    floats = floats.copy()
    for slot, part in zip(layout.weights, by_layer(layout, change), strict=True):
        weight = floats[slot.offset : slot.stop].reshape(slot.shape[0], -1)
        divisor = np.prod(slot.shape[2:] if len(slot.shape) == 4 else slot.shape[1:])
        step = part * np.sign(weight.sum(1, dtype=np.float64)) / divisor
        weight -= step.astype(np.float32)[:, None]
    return floats


def by_layer(layout: Layout, values: Floats) -> list[Floats]:
    """One number for each output channel, cut into layers."""
    return np.split(values, np.cumsum([slot.shape[0] for slot in layout.weights])[:-1])
