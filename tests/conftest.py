# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the same seeds."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is what code outside this repository draws from
    torch.manual_seed(0)
