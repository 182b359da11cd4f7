# SPDX-License-Identifier: Apache-2.0
"""Optimiser steps over the parameters of a network, 2 % of its weights and all of them: ours, and torch's forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import fedpai_kernels as fk
from fedpai import models

OPTIMISERS: dict[str, dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": {"ours": fk.optim.SGD, "torch": torch.optim.SGD},
    "adam": {"ours": fk.optim.Adam, "torch": torch.optim.Adam},
}
OPTIONS = {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}, "adam": {}}
FORMS = {
    "ours": {},
    "torch_fused": {"fused": True},
    "torch_foreach": {"foreach": True},
    "torch_plain": {"foreach": False},
}


def parameters(model: str, density: float) -> list[nn.Parameter]:
    """As many values as the layers of a network keep, with gradients."""
    network = models.create(model, num_classes=10, in_channels=3, image_size=32, seed=0)
    shares = [(p.numel(), density if p.dim() > 1 else 1.0) for p in network.parameters()]
    found = [nn.Parameter(torch.randn(round(share * count))) for count, share in shares]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("model", ["resnet18"])
def test_optimiser(
    benchmark: BenchmarkFixture, model: str, density: float, optimiser: str, form: str
) -> None:
    make = OPTIMISERS[optimiser][form.partition("_")[0]]
    stepped = make(parameters(model, density), lr=1e-3, **OPTIONS[optimiser], **FORMS[form])
    benchmark.group = f"{optimiser}, {model}, density {density:g}"
    benchmark.pedantic(stepped.step, rounds=30, iterations=2, warmup_rounds=3)
