# SPDX-License-Identifier: Apache-2.0
"""Batch-last pooling modules behave as torch's, which they also are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fedpai_kernels as fk

POOLS: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    "max": (nn.MaxPool2d, fk.nn.BatchLastMaxPool2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "max_ceil": (
        nn.MaxPool2d,
        fk.nn.BatchLastMaxPool2d,
        {"kernel_size": 2, "ceil_mode": True, "dilation": 2},
    ),
    "avg": (nn.AvgPool2d, fk.nn.BatchLastAvgPool2d, {"kernel_size": (3, 2), "padding": 1, "ceil_mode": True}),
    "avg_divisor": (nn.AvgPool2d, fk.nn.BatchLastAvgPool2d, {"kernel_size": 2, "divisor_override": 3}),
    "adaptive": (nn.AdaptiveAvgPool2d, fk.nn.BatchLastAdaptiveAvgPool2d, {"output_size": (None, 2)}),
}


@pytest.mark.parametrize(("plain", "ours", "settings"), POOLS.values(), ids=POOLS.keys())
def test_pools(plain: type[nn.Module], ours: type[nn.Module], settings: dict[str, Any]) -> None:
    theirs, module = plain(**settings), ours(**settings)
    assert isinstance(module, plain)
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64)
    y = module(fk.to_batch_last(x))
    assert fk.is_batch_last(y)
    torch.testing.assert_close(y, theirs(x))
    for source in (x, x.contiguous(memory_format=torch.channels_last), x[0]):  # torch's own path
        assert torch.equal(module(source), theirs(source))
        assert module(source).stride() == theirs(source).stride()


def test_max_pool_with_indices_is_torch_s() -> None:
    x = fk.to_batch_last(torch.randn(4, 3, 6, 6))
    module = fk.nn.BatchLastMaxPool2d(2, return_indices=True)
    for a, b in zip(module(x), nn.MaxPool2d(2, return_indices=True)(x), strict=True):
        assert torch.equal(a, b)
