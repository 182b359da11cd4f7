# SPDX-License-Identifier: Apache-2.0
"""One-shot magnitude pruning of the initial weights."""

from __future__ import annotations

from fedpai.methods.fixed import FixedMask


class Magnitude(FixedMask):
    """Keeps the largest initial weights, one mask for everybody, and trains them."""

    name = "magnitude"
    summary = "one mask for everybody: the largest weights of the initial model"
    criterion = "magnitude"
