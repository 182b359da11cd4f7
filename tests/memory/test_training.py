# SPDX-License-Identifier: Apache-2.0
"""Training on cached memory: nothing is asked of the system once a step has run, and the bits stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels import memory

pytestmark = pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")


def network() -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 32), (32, 64)):
        convolution = nn.Conv2d(inside, outside, 3, padding=1)
        convolution.weight.data *= torch.rand_like(convolution.weight) < 0.3
        layers += [convolution, nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    fk.sparsify_(model)
    return model


def train(steps: int) -> tuple[list[Tensor], list[int]]:
    """The parameters after some steps, and how often each step asked the system for memory."""
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    misses = []
    for _ in range(steps):
        before = fk.memory_stats().misses
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimiser.step()
        misses.append(fk.memory_stats().misses - before)
    return [parameter.detach() for parameter in model.parameters()], misses


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fk.empty_cache()
    torch.manual_seed(0)
    cached, misses = train(5)
    assert misses[0] > 0
    assert misses[2:] == [0, 0, 0]

    monkeypatch.setattr(memory, "ENABLED", False)
    torch.manual_seed(0)
    plain, misses = train(5)
    assert misses == [0] * 5
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))
