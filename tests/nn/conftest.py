# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of modules."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from fedpai_kernels.nn import deferred, waiting
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


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that a norm and a convolution were computed in one."""
    calls: list[bool] = []
    original = waiting.norm_conv2d

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(waiting, "norm_conv2d", count)
    return calls


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Any:
    yield
    assert not deferred._PERMITS.given
    assert not deferred._PERMITS.uncounted
