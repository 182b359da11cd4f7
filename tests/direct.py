# SPDX-License-Identifier: Apache-2.0
"""Convolution and its gradients as plain sums over the non-zeros, in extended precision (80 bits on x86).

Written from the definition, without torch. It judges the reference itself, and float64 results, whose rounding errors a
float64 reference cannot show. Slow: for the sizes of the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.longdouble]
Pair = tuple[int, int]


class DirectResults(NamedTuple):
    """Extended-precision arrays; bias gradients are computed whether or not there is a bias."""

    fwd: Array
    dx: Array
    dw: Array
    db: Array


def _reached(outputs: int, extent: int, stride: int, shift: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Output positions whose tap lies inside the image, and the input positions that it reads."""
    out = np.arange(outputs)
    read = out * stride + shift
    inside = (read >= 0) & (read < extent)
    return out[inside], read[inside]


def direct_conv2d(
    x: NDArray[np.floating],
    values: NDArray[np.floating],
    mask: NDArray[np.bool_],
    bias: NDArray[np.floating] | None,
    dy: NDArray[np.floating],
    stride: Pair,
    pad_front: Pair,
    dilation: Pair,
    groups: int,
) -> DirectResults:
    """y, dx, dvalues and dbias of a convolution of (N, C, H, W) with the packed values of a 4-D mask."""
    wide_x, wide_values, wide_dy = (a.astype(np.longdouble) for a in (x, values, dy))
    y, dx, dw = np.zeros_like(wide_dy), np.zeros_like(wide_x), np.zeros_like(wide_values)
    out_per_group, in_per_group = mask.shape[0] // groups, mask.shape[1]
    for j, (o, i, ky, kx) in enumerate(np.argwhere(mask)):
        source = o // out_per_group * in_per_group + i
        out_rows, rows = _reached(y.shape[2], x.shape[2], stride[0], ky * dilation[0] - pad_front[0])
        out_columns, columns = _reached(y.shape[3], x.shape[3], stride[1], kx * dilation[1] - pad_front[1])
        to = (slice(None), o, out_rows[:, None], out_columns)
        of = (slice(None), source, rows[:, None], columns)
        y[to] += wide_values[j] * wide_x[of]
        dx[of] += wide_values[j] * wide_dy[to]
        dw[j] = (wide_dy[to] * wide_x[of]).sum()
    if bias is not None:
        y += bias.astype(np.longdouble)[:, None, None]
    return DirectResults(y, dx, dw, wide_dy.sum((0, 2, 3)))
