# SPDX-License-Identifier: Apache-2.0
"""Which kernel a masked layer gets: the sparse one, or the dense one with a masked weight. The only place
that says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["KernelChoice", "LayerInfo", "choose_kernel"]

# Density above which the dense kernel is taken; measured in lab/004_break_even.
CONV2D_BREAK_EVEN = 0.8
DEPTHWISE_BREAK_EVEN = 1.0
LINEAR_BREAK_EVEN = 0.35
# Weights per output channel up to which a convolution without a mask is walked as one that keeps everything.
FULL_CONV2D_FAN_IN = 300


@dataclass(frozen=True)
class LayerInfo:
    """What the choice may look at.

    Attributes:
        kind: "conv2d" or "linear".
        shape: of the weight, (out, in / groups, kernel_h, kernel_w) or (out, in).
        nnz: surviving weights.
        groups: of the convolution; 1 for a linear layer.
        stride: of the convolution; (1, 1) for a linear layer.
    """

    kind: Literal["conv2d", "linear"]
    shape: tuple[int, ...]
    nnz: int
    groups: int = 1
    stride: tuple[int, int] = (1, 1)

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


def choose_kernel(layer: LayerInfo) -> KernelChoice:
    """The kernel for one layer, by its density alone.

    Alone, a dense convolution overtakes the sparse one at a density of 0.5 to 0.8. Among batch-last layers it
    must change the layout of what it reads and writes, and unpack its weight, which moves that to 0.8 and
    beyond. A dense depthwise convolution is limited by memory just as the sparse one, which therefore never
    loses to it. A linear layer has one "pixel" per row of the batch to reuse a weight on, and loses earlier.
    """
    if layer.kind == "linear":
        limit = LINEAR_BREAK_EVEN
    elif layer.groups > 1 and layer.shape[1] == 1:
        limit = DEPTHWISE_BREAK_EVEN
    else:
        limit = CONV2D_BREAK_EVEN
    if layer.density <= limit:
        return KernelChoice("sparse", f"density {layer.density:.3g} is at most the break-even of {limit:g}")
    return KernelChoice("dense", f"density {layer.density:.3g} is above the break-even of {limit:g}")


def walks_in_full(in_channels: int, groups: int, kernel_size: tuple[int, int]) -> bool:
    """Whether a convolution without a mask, among batch-last layers, is faster by the sparse kernel.

    So it is where it has few weights per output: it is limited by memory, and needs no change of layout.
    """
    return in_channels // groups * kernel_size[0] * kernel_size[1] <= FULL_CONV2D_FAN_IN
