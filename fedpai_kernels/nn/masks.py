# SPDX-License-Identifier: Apache-2.0
"""Where masks come from: an argument, `torch.nn.utils.prune`, or the exact zeros of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..plan import Plan
from ..structure import Block, NOfM, Structure, check, grouped, parse

__all__ = ["check_structure", "checked_mask", "is_pruned", "mask_of", "plan_for"]


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


def check_structure(layers: Sequence[tuple[str, nn.Module, Tensor]], structure: str | Structure) -> None:
    """Checks that all masks have a structure; ``"auto"`` is any.

    Args:
        layers: name, module and bool mask of each.
        structure: a structure, or its name. Layers smaller than a block, or narrower than an M, are all edge.

    Raises:
        ValueError: an unknown structure; a block that is larger than every layer; a mask that is not of it (the message
            names the layer, and the first block or channel that is not).
    """
    if structure == "auto":
        return
    kind = parse(structure) if isinstance(structure, str) else structure
    if isinstance(kind, Block) and layers and not any(_fits(kind, *layer[1:]) for layer in layers):
        raise ValueError(f"structure: a block of {kind} is larger than every layer that gets a mask")
    for name, module, mask in layers:
        try:
            wanted = _cut_to(kind, module, mask)
            if wanted is not None:
                check(mask, wanted, _groups(module))
        except ValueError as error:
            raise ValueError(f"masks[{name!r}]: {error}") from None


def _fits(block: Block, module: nn.Module, mask: Tensor) -> bool:
    _, rows, columns, _ = grouped(mask, _groups(module)).shape
    return rows >= block.rows and columns >= block.columns


def _cut_to(kind: Structure, module: nn.Module, mask: Tensor) -> Structure | None:
    """The structure at the edges of a layer that is smaller; None where nothing is left of it."""
    _, rows, columns, taps = grouped(mask, _groups(module)).shape
    if isinstance(kind, Block):
        rows, columns, together = min(kind.rows, rows), min(kind.columns, columns), kind.taps and taps > 1
        return Block(rows, columns, together) if rows * columns > 1 or together else None
    if isinstance(kind, NOfM) and kind.m > columns:
        return NOfM(kind.n, columns) if kind.n < columns else None
    return kind


def _groups(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


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
    shape, groups = unpruned_weight(module).shape, _groups(module)
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
