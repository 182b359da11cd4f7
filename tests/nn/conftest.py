# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of modules."""

from __future__ import annotations

import pytest
from torch import Tensor

from fedpai_kernels.nn.deferred import PendingNorm


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[PendingNorm]:
    """The norms that had to be computed by themselves."""
    calls: list[PendingNorm] = []
    original = PendingNorm.computed

    def count(self: PendingNorm) -> Tensor:
        calls.append(self)
        return original(self)

    monkeypatch.setattr(PendingNorm, "computed", count)
    return calls
