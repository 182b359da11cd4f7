# SPDX-License-Identifier: Apache-2.0
"""Where masks come from: an argument, `torch.nn.utils.prune`, or the exact zeros of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..plan import Plan

__all__ = ["checked_mask", "is_pruned", "mask_of", "plan_for"]


def is_pruned(module: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` computes the module's `weight`."""
    return "weight_orig" in module._parameters and "weight_mask" in module._buffers


def checked_mask(mask: object, shape: torch.Size, name: str = "mask") -> Tensor:
    """`mask` as a bool tensor.

    Raises:
        TypeError: no tensor, or of a complex dtype.
        ValueError: another shape than `shape`; NaN, infinity or anything but 0 and 1; no weight kept.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(mask).__name__}")
    if mask.is_complex():
        raise TypeError(f"{name}: expected dtype torch.bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{name}: expected the shape of the weight, {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        wrong = (mask != 0) & (mask != 1)  # NaN is neither
        if wrong.any():
            example = mask[wrong].flatten()[0].item()
            raise ValueError(
                f"{name}: expected True and False, or exactly 0 and 1, got {example} among its entries"
            )
        mask = mask != 0
    if not mask.any():
        raise ValueError(
            f"{name}: it keeps no weight; a layer without weights should be removed from the model"
        )
    return mask.detach()


def mask_of(module: nn.Module) -> Tensor | None:
    """The mask that a dense module carries: of `prune`, else its weight's exact zeros. None: it has none.

    A weight of nothing but zeros is an initialisation, not a mask.
    """
    if is_pruned(module):
        mask = module._buffers["weight_mask"]
        return None if mask is None else mask != 0
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    mask = weight.detach() != 0
    return mask if mask.any() and not mask.all() else None


def unpruned_weight(module: nn.Module) -> Tensor:
    """The dense weight, with the reparametrisation of `prune` applied."""
    if is_pruned(module):
        return module._parameters["weight_orig"] * module._buffers["weight_mask"]  # type: ignore[operator]
    weight = module._parameters["weight"]
    assert weight is not None  # a layer without a weight was refused before
    return weight


def remove_pruning(module: nn.Module) -> None:
    """Makes the pruned weight an ordinary parameter again, without the buffers and hooks of `prune`."""
    prune.remove(module, "weight")


def plan_for(module: nn.Module, mask: Tensor | Plan | None) -> Plan:
    """The plan of a dense Conv2d or Linear; without a mask, of what :func:`mask_of` finds, else of all
    weights.

    Raises:
        TypeError, ValueError: as :func:`checked_mask`; a plan of another shape or number of groups.
    """
    shape, groups = unpruned_weight(module).shape, int(getattr(module, "groups", 1))
    if isinstance(mask, Plan):
        if mask.mask_shape != tuple(shape) or mask.groups != groups:
            raise ValueError(
                f"mask: the plan is for shape {mask.mask_shape} in {mask.groups} groups, "
                f"the weight has shape {tuple(shape)} in {groups}"
            )
        return mask
    if mask is None:
        mask = mask_of(module)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    return Plan.from_mask(checked_mask(mask, shape), groups=groups)
