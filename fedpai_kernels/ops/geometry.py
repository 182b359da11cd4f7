# SPDX-License-Identifier: Apache-2.0
"""The geometry of a convolution: stride, padding and dilation, with torch's meanings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Stride, padding in front (top, left) and behind (bottom, right), and dilation, in pixels."""

    stride: Pair
    pad_front: Pair
    pad_back: Pair
    dilation: Pair

    def output_size(self, image: Sequence[int], kernel: Pair) -> Pair:
        """Height and width of the output. May be non-positive when the image is too small."""
        (h, w), (kernel_h, kernel_w), (stride_h, stride_w) = image, kernel, self.stride
        (top, left), (bottom, right), (step_h, step_w) = self.pad_front, self.pad_back, self.dilation
        return (
            (h + top + bottom - step_h * (kernel_h - 1) - 1) // stride_h + 1,
            (w + left + right - step_w * (kernel_w - 1) - 1) // stride_w + 1,
        )


# Products of such numbers fit the kernels' 64 bits.
_LARGEST = 2**31 - 1


def _pair(name: str, value: int | tuple[int, int], least: int) -> Pair:
    if type(value) is tuple and len(value) == 2:  # as modules have it; this is called for every layer of every step
        first, second = value
        if type(first) is int and type(second) is int and least <= first <= _LARGEST and least <= second <= _LARGEST:
            return value
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
    stride, front, back, dilation = geometry
    return [*stride, *front, *back, *dilation]


def compiled_geometry(batch: int, image: Sequence[int], output: Sequence[int], geometry: list[int]) -> list[int]:
    """A flattened geometry as the binding takes it: without the padding behind, which the output's size says."""
    return [batch, *image, *output, *geometry[:4], *geometry[6:]]
