# SPDX-License-Identifier: Apache-2.0
"""The figures themselves, and those that hold where nobody has measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUILT_IN", "BreakEvens"]


@dataclass(frozen=True)
class BreakEvens:
    """Up to which density the sparse kernel is taken, by kind of layer; above, the dense one.

    Attributes:
        conv2d: kernels of more than one pixel, stride 1.
        strided: kernels of more than one pixel, larger strides.
        pointwise: kernels of one pixel.
        linear: linear layers.
        blocks, linear_blocks: convolutions and linear layers most of whose channels share their weights with others, as
            in blocks.
        full_fan_in: weights per output channel up to which a convolution without a mask, among batch-last layers,
            is computed by the sparse kernel as one that keeps everything.
        source: where the figures come from, for reports.
    """

    conv2d: float
    strided: float
    pointwise: float
    linear: float
    blocks: float
    linear_blocks: float
    full_fan_in: int
    source: str

    def densities(self) -> dict[str, float]:
        """The break-even densities by name."""
        return {
            "conv2d": self.conv2d,
            "strided": self.strided,
            "pointwise": self.pointwise,
            "linear": self.linear,
            "blocks": self.blocks,
            "linear_blocks": self.linear_blocks,
        }

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {density:.2g}" for name, density in self.densities().items())
        return f"{shown}; without a mask up to {self.full_fan_in} weights per output"


# Measured in lab/004_break_even.
BUILT_IN = BreakEvens(
    conv2d=0.8,
    strided=0.8,
    pointwise=0.8,
    linear=0.35,
    blocks=1.0,
    linear_blocks=0.8,
    full_fan_in=300,
    source="built in",
)
