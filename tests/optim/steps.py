# SPDX-License-Identifier: Apache-2.0
"""The list of optimisers with their options, and what a run of some steps is compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fedpai_kernels as fk

Make = Callable[..., torch.optim.Optimizer]
Tensors = Sequence[Tensor]

# name: (class, options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "sgd_maximize": ("SGD", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "sgd_nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd_all": (
        "SGD",
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    ),
    "adam": ("Adam", {"lr": 0.01}),
    "adam_decay": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
    "adam_amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.5, 0.7)}),
    "adam_large_pull": ("Adam", {"lr": 0.01, "betas": (0.2, 0.9)}),
    "adam_maximize": ("Adam", {"lr": 0.01, "maximize": True, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.01, "weight_decay": 0.5, "amsgrad": True, "maximize": True}),
}


def makers(name: str) -> tuple[Make, Make]:
    """Our class and torch's."""
    return getattr(fk.optim, name), getattr(torch.optim, name)


def leaves(values: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters with copies of the values, strides included."""
    return [nn.Parameter(value.detach().clone()) for value in values]


def trained(make: Make, values: Tensors, grads: Sequence[Tensors], **options: Any) -> list[list[Tensor]]:
    """Parameters after each step, followed by the state after the last, one list for each kind."""
    params = leaves(values)
    optimiser = make(params, **options)
    history = []
    for of_step in grads:
        for p, grad in zip(params, of_step, strict=True):
            p.grad = grad.to(p.dtype)
        optimiser.step()
        history.append([p.detach().clone() for p in params])
    keys = sorted(optimiser.state[params[0]])
    return history + [[optimiser.state[p][key] for p in params] for key in keys]


def strides(t: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def random_run(values: Tensors, steps: int) -> list[list[Tensor]]:
    """Gradients of some steps, float64 but of numbers that float32 has, strides as the values'."""
    return [[torch.empty_like(v).normal_().float().to(torch.float64) for v in values] for _ in range(steps)]


def assert_as_close_as_torch(
    name: str, values: Tensors, grads: Sequence[Tensors], dtype: torch.dtype
) -> None:
    """The rounded regime of docs/numerics.md, the reference being torch's plain loop in float64."""
    kind, options = CASES[name]
    ours, torchs = makers(kind)
    rounded = [value.to(dtype) for value in values]
    exact = trained(torchs, [v.to(torch.float64) for v in rounded], grads, foreach=False, **options)
    theirs = trained(torchs, rounded, grads, foreach=False, **options)
    found = trained(ours, rounded, grads, **options)
    for of_ours, of_theirs, of_exact in zip(found, theirs, exact, strict=True):
        for mine, other in zip(of_ours, of_theirs, strict=True):
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            assert strides(mine) == strides(other)
        mine, other, right = (
            torch.cat([t.reshape(-1) for t in each]) for each in (of_ours, of_theirs, of_exact)
        )
        if right.numel():
            error, allowed = (mine - right).abs().max().item(), (other - right).abs().max().item()
            floor = 4 * torch.finfo(dtype).eps * right.abs().max().item()
            assert error <= 2 * allowed + floor, f"{error:.3g} against {allowed:.3g} of torch"
