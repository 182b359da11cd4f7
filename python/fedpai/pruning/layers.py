# SPDX-License-Identifier: Apache-2.0
"""Which layers can be pruned, and a copy of the model to score them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Exclude = Callable[[str, nn.Module], bool] | Collection[str]
Shape = tuple[int, ...]


def prunable_layers(model: nn.Module, exclude: Exclude | None = None) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers of a model by name, in module order.

    Args:
        model: any module.
        exclude: layers to leave dense: names, or a function of (name, module) that is true for them.

    Raises:
        ValueError: no layer is left, an excluded name that is no such layer, a layer whose weight is empty,
            is shared with another layer, or is computed rather than a plain parameter.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if callable(exclude):
        layers = {name: module for name, module in found.items() if not exclude(name, module)}
    else:
        names = {exclude} if isinstance(exclude, str) else set(exclude or ())
        if names - set(found):
            raise ValueError(
                f"exclude: no convolution or linear layer is called {', '.join(sorted(names - set(found)))}"
            )
        layers = {name: module for name, module in found.items() if name not in names}
    if not layers:
        raise ValueError("model: no nn.Conv2d or nn.Linear is left to prune")
    owners: dict[int, str] = {}
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name}: its weight is not a plain parameter (already pruned or parametrised?)")
        if weight.numel() == 0:
            raise ValueError(f"{name}: its weight is empty {tuple(weight.shape)}")
        if id(weight) in owners:
            raise ValueError(f"{name}: shares its weight with {owners[id(weight)]}; exclude one of them")
        owners[id(weight)] = name
    return layers


def scoring_copy(
    model: nn.Module, exclude: Exclude | None
) -> tuple[nn.Module, dict[str, nn.Conv2d | nn.Linear]]:
    """A deep copy in which only prunable weights require gradients, and its prunable layers.

    All scoring happens on such copies, so parameters, gradients, buffers and modes of the model stay
    untouched.
    """
    prunable_layers(model, exclude)
    duplicate = copy.deepcopy(model)
    layers = prunable_layers(duplicate, exclude)
    for parameter in duplicate.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    for module in layers.values():
        module.weight.requires_grad_(True)
    return duplicate, layers


def input_shape_of(model: nn.Module, given: Shape | None = None) -> Shape:
    """The shape of one input, without the batch.

    The given one, else the model's attribute ``input_shape``, else 32x32 with the channels of its first
    convolution.

    Raises:
        ValueError: none of these tells.
    """
    shape = given if given is not None else getattr(model, "input_shape", None)
    if shape is not None:
        return tuple(int(size) for size in shape)
    first = next(iter(prunable_layers(model).values()))
    if isinstance(first, nn.Conv2d):
        return first.in_channels, 32, 32
    raise ValueError(
        "input_shape: cannot be inferred for this model, expected for example input_shape=(3, 32, 32)"
    )
