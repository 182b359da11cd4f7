# SPDX-License-Identifier: Apache-2.0
"""Images and settings under which a method and its restatement can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedpai.data import Dataset, synthetic
from fedpai.federation.config import RunConfig
from tests.fedpai.methods.restatement import GENTLE, STRONG

Make = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def few() -> Dataset:
    """So few images that clients train on all of theirs, which makes n_k uneven."""
    return synthetic(train_size=160, test_size=200, in_channels=1)


@pytest.fixture(scope="session")
def small() -> Dataset:
    """As few, of a quarter of the pixels: a restatement spends its time in convolutions in float64."""
    return synthetic(train_size=160, test_size=200, in_channels=1, image_size=16)


@pytest.fixture
def telling(tiny: Make) -> Make:
    """Makes configurations under which every factor of the formulas moves the result beyond the bound."""

    def make(**changes: Any) -> RunConfig:
        settings = {"lr": GENTLE, "weight_decay": STRONG, "alpha": 0.3, "max_images": None}
        return tiny(**{**settings, **changes})

    return make
