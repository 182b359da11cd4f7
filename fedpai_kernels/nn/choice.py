# SPDX-License-Identifier: Apache-2.0
"""Which kernel a masked layer gets: the sparse one, or the dense one with a masked weight. The only place
that says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..tuning import BUILT_IN, BreakEvens

__all__ = ["KernelChoice", "LayerInfo", "choose_kernel"]


@dataclass(frozen=True)
class LayerInfo:
    """What the choice may look at.

    Attributes:
        kind: "conv2d" or "linear".
        shape: of the weight, (out, in / groups, kernel_h, kernel_w) or (out, in).
        nnz: surviving weights.
        groups: of the convolution; 1 for a linear layer.
        stride: of the convolution; (1, 1) for a linear layer.
        shared: how much of the work channels with the same weights do together (:attr:`fedpai_kernels.Plan.shared`).
    """

    kind: Literal["conv2d", "linear"]
    shape: tuple[int, ...]
    nnz: int
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    shared: float = 0.0

    @property
    def density(self) -> float:
        """Share of the weights that survive."""
        numel = 1
        for size in self.shape:
            numel *= size
        return self.nnz / numel


class KernelChoice(NamedTuple):
    """`kernel` is "sparse" or "dense"; `reason` is one clause for the report."""

    kernel: Literal["sparse", "dense"]
    reason: str


# Blocks of 16x1 have two thirds.
_MOSTLY = 0.6


def choose_kernel(layer: LayerInfo, figures: BreakEvens = BUILT_IN) -> KernelChoice:
    """The kernel for one layer, by its density and its kind.

    Alone, a dense convolution overtakes the sparse one at a density of 0.5 to 0.8. Among batch-last layers it
    must change the layout of what it reads and writes, and unpack its weight, which moves that to 0.8 and
    beyond. A dense depthwise convolution is limited by memory just as the sparse one, which therefore never
    loses to it. A linear layer has one "pixel" per row of the batch to reuse a weight on, and loses earlier. Blocks,
    whole channels and dense masks are computed as small dense products, and win up to higher densities.

    Args:
        layer: the layer.
        figures: break-even densities; :func:`fedpai_kernels.tuning.break_evens` has those of this machine.
    """
    limit, source = _break_even(layer, figures), figures.source
    if layer.density <= limit:
        return KernelChoice(
            "sparse", f"density {layer.density:.3g} is at most the break-even of {limit:.3g} ({source})"
        )
    return KernelChoice(
        "dense", f"density {layer.density:.3g} is above the break-even of {limit:.3g} ({source})"
    )


def _break_even(layer: LayerInfo, figures: BreakEvens) -> float:
    if layer.shared >= _MOSTLY:
        return figures.linear_blocks if layer.kind == "linear" else figures.blocks
    if layer.kind == "linear":
        return figures.linear
    if layer.groups > 1 and layer.shape[1] == 1:
        return 1.0  # depthwise
    if tuple(layer.shape[2:]) == (1, 1):
        return figures.pointwise
    return figures.conv2d if tuple(layer.stride) == (1, 1) else figures.strided


def walks_in_full(in_channels: int, groups: int, kernel_size: tuple[int, int], full_fan_in: int) -> bool:
    """Whether a convolution without a mask, among batch-last layers, is faster by the sparse kernel.

    So it is where it has few weights per output (`full_fan_in` at most): it is limited by memory, and needs no change
    of layout.
    """
    return in_channels // groups * kernel_size[0] * kernel_size[1] <= full_fan_in
