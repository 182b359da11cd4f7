# SPDX-License-Identifier: Apache-2.0
"""Coarse scores: what a client's saliencies become where they travel as small integers (ours).

    q = round(s / step)    clipped to 16 bits        step = tau / 4

tau is the size of the K-th largest |s|, with K the number of weights that the run keeps. So scores near those that
decide have a few levels, and most of the others become zeros, which deflate takes out. Large and negative scores stay:
those of different clients cancel in the mean.
"""

from __future__ import annotations

import numpy as np

from fedpai.federation.coding import PayloadError
from fedpai.federation.layout import Floats

LEVELS = 4
"""Steps from 0 to tau."""
_LARGEST = np.float32(2**15 - 1)


def coarse(scores: Floats, kept: int) -> Floats:
    """Integers in [-32767, 32767], one for each score, and after them the step whose multiples they are.

    Args:
        scores: float32, finite.
        kept: K, how many weights the run keeps.
    """
    sizes = np.abs(scores)
    rank = sizes.size - min(max(kept, 1), sizes.size)
    tau = np.partition(sizes, rank)[rank]
    step = np.float32(tau / LEVELS) or np.float32(sizes.max() / _LARGEST) or np.float32(1)
    with np.errstate(over="ignore"):  # infinite levels are clipped as other large ones
        levels = np.rint(scores / step).clip(-_LARGEST, _LARGEST)
    return np.append(levels, step).astype(np.float32)


def restored(message: Floats) -> Floats:
    """The inverse of `coarse`, but for its rounding: one float32 score a weight.

    Raises:
        PayloadError: a step that is not above 0, or with which a score is not finite.
    """
    step = message[-1]
    with np.errstate(over="ignore"):
        scores = message[:-1] * step
    if not (step > 0 and np.isfinite(scores).all()):
        raise PayloadError(
            f"payload scores have a step of {step}, expected one above 0 that leaves them finite"
        )
    return scores
