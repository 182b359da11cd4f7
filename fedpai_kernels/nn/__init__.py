# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules over the ops, and the conversion of whole models (:mod:`fedpai_kernels.nn.convert`)."""

from .choice import KernelChoice, LayerInfo, choose_kernel
from .conv2d import BatchLastConv2d, MaskedConv2d, SparseConv2d
from .deferred import DeferrableBatchNorm2d, DeferrableGroupNorm
from .group_norm import BatchLastGroupNorm, BatchLastInstanceNorm2d
from .linear import MaskedLinear, SparseLinear
from .norm import BatchLastBatchNorm2d
from .packed import PackedWeight
from .pool import BatchLastAdaptiveAvgPool2d, BatchLastAvgPool2d, BatchLastMaxPool2d
from .removed import parts_of

__all__ = [
    "BatchLastAdaptiveAvgPool2d",
    "BatchLastAvgPool2d",
    "BatchLastBatchNorm2d",
    "BatchLastConv2d",
    "BatchLastGroupNorm",
    "BatchLastInstanceNorm2d",
    "BatchLastMaxPool2d",
    "DeferrableBatchNorm2d",
    "DeferrableGroupNorm",
    "KernelChoice",
    "LayerInfo",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedWeight",
    "SparseConv2d",
    "SparseLinear",
    "choose_kernel",
    "parts_of",
]
