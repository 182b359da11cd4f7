# SPDX-License-Identifier: Apache-2.0
"""Tells the modules of a converted model in which dtype to keep their activations for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..ops.stored import check_activation_dtype
from .conv2d import BatchLastConv2d, SparseConv2d
from .group_norm import BatchLastGroupNorm, BatchLastInstanceNorm2d
from .linear import SparseLinear
from .norm import BatchLastBatchNorm2d
from .packed import PackedWeight

__all__ = ["check_float32", "short_name", "tell_activation_dtype"]

Filter = Callable[[nn.Module, str], bool]

# What keeps activations by functions of this package. Pooling keeps positions only; dense layers are torch's.
_STORING = (
    SparseConv2d, SparseLinear, BatchLastConv2d, BatchLastBatchNorm2d, BatchLastGroupNorm, BatchLastInstanceNorm2d,
)  # fmt: skip
_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, PackedWeight)


def check_float32(names: Mapping[str, nn.Module], wanted: Filter, activation_dtype: torch.dtype | None) -> None:
    """Raises what :func:`fedpai_kernels.sparsify_` raises for an `activation_dtype` that cannot be."""
    check_activation_dtype(activation_dtype)
    if activation_dtype is None:
        return
    for name, module in names.items():
        if not isinstance(module, _LAYERS) or not wanted(module, name):
            continue
        if any(p.dtype == torch.float64 for p in module.parameters(recurse=False)):
            raise TypeError(
                f"activation_dtype: {activation_dtype} stands in for float32 activations, but {name!r} is float64"
            )


def tell_activation_dtype(
    names: Mapping[str, nn.Module], wanted: Filter, activation_dtype: torch.dtype | None
) -> list[str]:
    """Sets the attribute, or takes it away for None. Returns notes for the report."""
    counts: dict[str, int] = {}
    for name, module in names.items():
        if isinstance(module, _STORING) and wanted(module, name):
            module.__dict__.pop("activation_dtype", None)
            if activation_dtype is not None:
                module.activation_dtype = activation_dtype
                counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    if activation_dtype is None:
        return []
    by = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no module, as nothing is sparse"
    return [f"activations kept in {short_name(activation_dtype)}: by {by}"]


def short_name(dtype: torch.dtype | None) -> str | None:
    """The dtype without ``torch.``."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
