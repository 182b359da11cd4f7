# SPDX-License-Identifier: Apache-2.0
"""The geometry of a convolution: stride, padding and dilation, with torch's meanings."""

from __future__ import annotations

from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Stride, padding in front (top, left) and behind (bottom, right), and dilation, in pixels."""

    stride: Pair
    pad_front: Pair
    pad_back: Pair
    dilation: Pair

    def output_size(self, image: Pair, kernel: Pair) -> Pair:
        """Height and width of the output. May be non-positive when the image is too small."""
        h, w = (
            (image[i] + self.pad_front[i] + self.pad_back[i] - self.dilation[i] * (kernel[i] - 1) - 1)
            // self.stride[i] + 1
            for i in (0, 1)
        )
        return h, w


# Products of such numbers fit the kernels' 64 bits.
_LARGEST = 2**31 - 1


def _pair(name: str, value: int | tuple[int, int], least: int) -> Pair:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and least <= v <= _LARGEST for v in pair):
        raise ValueError(f"{name}: expected an int or two ints, each from {least} to {_LARGEST}, got {value!r}")
    return pair


def resolve_geometry(
    kernel: Pair, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair
) -> Geometry:
    """Checks and expands the arguments of a convolution, with torch's meaning of ``"same"`` and ``"valid"``.

    Raises:
        ValueError: a value of the wrong form, an unknown padding name, or ``"same"`` with a stride.
    """
    steps = _pair("stride", stride, 1)
    spread = _pair("dilation", dilation, 1)
    if padding == "valid":
        return Geometry(steps, (0, 0), (0, 0), spread)
    if padding == "same":
        if steps != (1, 1):
            raise ValueError(f"padding: 'same' needs stride 1, got stride {steps}")
        total = (spread[0] * (kernel[0] - 1), spread[1] * (kernel[1] - 1))
        front = (total[0] // 2, total[1] // 2)
        return Geometry(steps, front, (total[0] - front[0], total[1] - front[1]), spread)
    if isinstance(padding, str):
        raise ValueError(f"padding: expected 'same', 'valid', an int or two ints, got {padding!r}")
    around = _pair("padding", padding, 0)
    return Geometry(steps, around, around, spread)


def unflatten(geometry: list[int]) -> Geometry:
    g = geometry
    return Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), (g[6], g[7]))


def flatten(geometry: Geometry) -> list[int]:
    return [v for pair in geometry for v in pair]


def compiled_geometry(batch: int, image: Pair, output: Pair, g: Geometry) -> list[int]:
    """As the binding takes it."""
    return [batch, *image, *output, *g.stride, *g.pad_front, *g.dilation]
