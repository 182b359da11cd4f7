# SPDX-License-Identifier: Apache-2.0
"""A random fixed mask: what any criterion has to beat."""

from __future__ import annotations

from fedpai.methods.fixed import FixedMask


class Random(FixedMask):
    """Keeps weights at random, one mask for everybody, drawn from the run's seed before training."""

    name = "random"
    summary = "one random mask for everybody, fixed before training"
    criterion = "random"
