# SPDX-License-Identifier: Apache-2.0
"""Error feedback: what rounding took from a message is added to the next one (Seide et al. 2014).

    sent_t = round(w_t + e_t-1)        e_t = w_t + e_t-1 - sent_t

so that the sum of what was sent differs from the sum of the w_t by one rounding, however many rounds there are, and
an update smaller than half a unit in the last place is not lost but waits. Whole models travel here, so a rounding
error is at most that half unit, which Karimireddy et al. (2019) ask of a compressor for SGD to converge as without it;
on both ways it is the double pass of DoubleSqueeze (Tang et al. 2019).

Only weights of conv and linear layers are rounded. All other floats, being few and, as running variances, of any
size, travel in float32 (mixed-precision training keeps them so, Micikevicius et al. 2018): the choice is ours.
"""

from __future__ import annotations

import numpy as np

from fedpai.federation.coding import DType, rounded
from fedpai.federation.layout import Floats, Layout, MaskSet

RESIDUAL = "wire.residual"
"""Where `extra` of a client or of the server keeps e_t: float32, one number a kept weight. Absent: 0."""


def with_feedback(extra: dict[str, np.ndarray], floats: Floats, exact: int, dtype: DType) -> Floats:
    """What travels in place of packed floats; updates the residual.

    Args:
        extra: the sender's memory.
        floats: float32, packed; the last `exact` ones are not rounded.

    Raises:
        PayloadError: a weight that the dtype cannot hold; the residual is as it was.
    """
    if dtype is DType.FLOAT32:
        return floats
    split = floats.size - exact
    wanted = floats[:split] + extra[RESIDUAL] if RESIDUAL in extra else floats[:split]
    sent = rounded(wanted, dtype)
    extra[RESIDUAL] = wanted - sent
    return np.concatenate((sent, floats[split:]))


def move_residual(
    extra: dict[str, np.ndarray], old: MaskSet | None, new: MaskSet | None, layout: Layout
) -> None:
    """Keeps the residual at its weights when the mask changes: that of dropped ones is lost, new ones start at 0."""
    if RESIDUAL in extra and old != new:
        dense = np.zeros(layout.weight_count, np.float32)
        dense[slice(None) if old is None else old.positions] = extra[RESIDUAL]
        extra[RESIDUAL] = dense if new is None else dense[new.positions]
