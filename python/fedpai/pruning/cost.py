# SPDX-License-Identifier: Apache-2.0
"""What one kept weight of a layer costs: multiply-adds, and time.

The time of a sparse layer's step is close to a straight line in its number of kept weights: what its activations cost,
whatever is kept, and from there on so much for each weight and position that it is applied at. Only the second part can
be chosen, so it is all that allocation ``"time"`` asks for. Lines fitted to measured layers: lab/006_time_masks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fedpai.pruning.criteria import Layers
from fedpai.pruning.layers import Shape, input_shape_of
from fedpai.pruning.summary import output_positions

NANOSECONDS: Mapping[str, float] = {"conv2d": 0.090, "strided": 0.108, "pointwise": 0.180, "linear": 0.270}
"""Of forward pass and both gradients, for one weight at one position of one image, by kind of layer. Masks that
everybody is to agree on need one table for everybody, so this one is never measured anew; only ratios matter."""


def positions(
    model: nn.Module, layers: Layers, input_shape: Shape | None = None, what: str = "budget"
) -> dict[str, int]:
    """Multiply-adds of one weight of each layer for one image: the positions it is applied at.

    Args:
        model: run once on a copy, on one blank image.
        layers: of it, those asked for.
        input_shape: see :func:`fedpai.pruning.prune`.
        what: the argument that asks for them, for the error.

    Raises:
        ValueError: a layer that one image does not reach.
    """
    found = output_positions(model, input_shape_of(model, input_shape))
    if idle := [name for name in layers if not found.get(name)]:
        raise ValueError(f"{what}: {', '.join(idle)} computes nothing for one image, expected layers that run")
    return {name: found[name] for name in layers}


def nanoseconds(model: nn.Module, layers: Layers, input_shape: Shape | None = None) -> dict[str, float]:
    """How much longer a training step takes, for each image, with one more weight in a layer.

    Arguments and errors: as :func:`positions`.
    """
    found = positions(model, layers, input_shape, "allocation")
    return {name: count * NANOSECONDS[kind_of(layers[name])] for name, count in found.items()}


def kind_of(layer: nn.Conv2d | nn.Linear) -> str:
    """The entry of :data:`NANOSECONDS`; kinds as for the choice of kernels (docs/choice.md)."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if tuple(layer.kernel_size) == (1, 1):
        return "pointwise"
    return "conv2d" if tuple(layer.stride) == (1, 1) else "strided"
