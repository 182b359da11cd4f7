# SPDX-License-Identifier: Apache-2.0
"""Steps over packed parameters against torch's own optimisers, several in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpai_kernels.triton import optim
from tests.triton.checking import DEVICE, needs_kernels

SIZE = 1500  # two programs, the second in part
STEPS = 4


def start() -> tuple[Tensor, list[Tensor]]:
    """Parameters, and a gradient for each step."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, generator=generator), [torch.randn(SIZE, generator=generator) for _ in range(STEPS)]


def by_torch(optimizer: type[torch.optim.Optimizer], **settings: Any) -> Tensor:
    """In float64, so that it is nearer to the truth than what is judged by it."""
    values, grads = start()
    p = nn.Parameter(values.double())
    steps = optimizer([p], **settings)  # type: ignore[call-arg]
    for grad in grads:
        p.grad = grad.double()
        steps.step()
    return p.detach()


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within a few roundings of float32 a step."""
    error = (got.cpu().double() - expected).abs().max()
    assert error <= 4 * STEPS * torch.finfo(torch.float32).eps * expected.abs().max()


@needs_kernels
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "maximize": True},
        {"lr": 0.1, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    ],
    ids=str,
)
def test_sgd(settings: dict[str, Any]) -> None:
    expected = by_torch(torch.optim.SGD, **settings)
    values, grads = (start()[0].to(DEVICE), start()[1])
    nesterov = settings.get("nesterov", False)
    factors = optim.sgd_factors(**{k: v for k, v in settings.items() if k != "nesterov"}).to(DEVICE)
    buffer = torch.full_like(values, float("nan")) if "momentum" in settings else None
    for i, grad in enumerate(grads):
        optim.sgd_step(
            values, grad.to(DEVICE), factors, buffer=buffer, first=i == 0, nesterov=nesterov,
            weight_decay="weight_decay" in settings,
        )  # fmt: skip
    assert_close(values, expected)


@needs_kernels
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    ],
)
def test_adam(optimizer: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    expected = by_torch(optimizer, **settings)
    values, grads = (start()[0].to(DEVICE), start()[1])
    m, v = torch.zeros_like(values), torch.zeros_like(values)
    decoupled = optimizer is torch.optim.AdamW
    factors = torch.empty(8, device=DEVICE)
    for i, grad in enumerate(grads):
        factors.copy_(optim.adam_factors(step=i + 1, decoupled=decoupled, **settings))
        optim.adam_step(
            values, grad.to(DEVICE), m, v, factors, weight_decay="weight_decay" in settings, decoupled=decoupled
        )
    assert_close(values, expected)


def test_packed_parameters_are_views() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(5, 3)
    expected = model(x)
    packed = optim.Packed(model.parameters())
    assert packed.values.numel() == sum(p.numel() for p in before)
    assert torch.equal(model(x), expected)
    assert torch.equal(packed.values, torch.cat([p.flatten() for p in before]))
    model(x).sum().backward()
    assert torch.equal(packed.grads, torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    packed.values.zero_()
    assert not any(p.any() for p in model.parameters())
    model.zero_grad(set_to_none=True)
    packed.zero_grad()
    model(x).sum().backward()
    assert torch.equal(packed.grads, torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]


def test_parameters_that_cannot_be_packed() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="got none"):
        optim.Packed([])
    with pytest.raises(ValueError, match="given twice"):
        optim.Packed([p, p])
    with pytest.raises(TypeError, match=r"parameters\[1\]: expected dtype torch.float32, got torch.float64"):
        optim.Packed([p, nn.Parameter(torch.zeros(3, dtype=torch.float64))])


def test_factors_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="lr: got -1, expected a finite number"):
        optim.sgd_factors(lr=-1)
    with pytest.raises(ValueError, match="step: got 0, expected 1 or more"):
        optim.adam_factors(step=0)
    with pytest.raises(ValueError, match="betas: got"):
        optim.adam_factors(step=1, betas=(0.9, 1.0))


def test_vectors_that_do_not_fit() -> None:
    values, factors = torch.zeros(6), optim.sgd_factors(lr=0.1)
    with pytest.raises(ValueError, match=r"grads: expected 6 adjacent elements, got shape \(5,\)"):
        optim.sgd_step(values, torch.zeros(5), factors)
    with pytest.raises(ValueError, match=r"factors: expected 8 adjacent elements, got shape \(3,\)"):
        optim.sgd_step(values, values, torch.zeros(3))
    with pytest.raises(ValueError, match="nesterov: needs momentum"):
        optim.sgd_step(values, values, factors, nesterov=True)
    with pytest.raises(TypeError, match=r"m: expected a torch.Tensor, got NoneType"):
        optim.adam_step(values, values, None, values, factors)  # type: ignore[arg-type]
