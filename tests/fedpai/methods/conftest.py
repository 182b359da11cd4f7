# SPDX-License-Identifier: Apache-2.0
"""Images and settings under which a method and its restatement can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedpai.data import Dataset, synthetic
from fedpai.federation.config import RunConfig

Make = Callable[..., RunConfig]

# Learning rate. At the default these few steps on noise amplify float32 rounding, dense torch's as much as ours, beyond
# any bound that would still find a wrong merge.
GENTLE = 0.0005
# Weight decay. Of the default's effect, so few and gentle steps leave less than the bound.
STRONG = 0.4


@pytest.fixture(scope="session")
def few() -> Dataset:
    """So few images that clients train on all of theirs, which makes n_k uneven."""
    return synthetic(train_size=160, test_size=200, in_channels=1)


@pytest.fixture
def telling(tiny: Make) -> Make:
    """Makes configurations under which every factor of the formulas moves the result beyond the bound."""

    def make(**changes: Any) -> RunConfig:
        settings = {"lr": GENTLE, "weight_decay": STRONG, "alpha": 0.3, "max_images": None}
        return tiny(**{**settings, **changes})

    return make
