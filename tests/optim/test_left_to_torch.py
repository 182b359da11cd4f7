# SPDX-License-Identifier: Apache-2.0
"""What the kernels cannot take is stepped by torch, in the same call, with torch's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from tests.optim.steps import makers

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1},
}


def negative() -> Tensor:
    """A tensor whose sign is not in memory yet."""
    lazy = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert lazy.is_neg()
    return lazy


class Marked(torch.Tensor):
    pass


# name: (value, gradient)
AWKWARD: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "gradient_transposed": lambda: (torch.randn(4, 6), torch.randn(6, 4).t()),
    "gradient_expanded": lambda: (torch.randn(4, 6), torch.randn(6).expand(4, 6)),
    "gradient_of_other_layout": lambda: (
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last), torch.randn(4, 3, 2, 2)
    ),
    "gradient_with_lazy_sign": lambda: (torch.randn(1), negative()),
    "parameter_with_gaps": lambda: (torch.randn(8, 6)[::2, 1:4], torch.randn(4, 3)),
    "half": lambda: (torch.randn(9).bfloat16(), torch.randn(9).bfloat16()),
    "complex": lambda: (torch.randn(9, dtype=torch.complex64), torch.randn(9, dtype=torch.complex64)),
    "subclass": lambda: (torch.randn(9).as_subclass(Marked), torch.randn(9)),
    "many_dimensions": lambda: (torch.randn([1, 2] * 10), torch.randn([1, 2] * 10)),
}  # fmt: skip


def run(make: Any, values: list[Tensor], grads: list[Tensor], steps: int = 3, **options: Any) -> list[Tensor]:
    """As they are: no copy, so that strides and types stay."""
    params = [value.detach().requires_grad_() for value in values]
    optimiser = make(params, **options)
    for _ in range(steps):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimiser.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("kind", OPTIONS)
def test_awkward_among_plain(kind: str, name: str) -> None:
    results = []
    for make in makers(kind):
        torch.manual_seed(1)
        value, grad = AWKWARD[name]()
        before = grad.clone()
        results.append(run(make, [torch.ones(5), value, torch.ones(3)], [torch.ones(5), grad, torch.ones(3)],
                           **OPTIONS[kind]))  # fmt: skip
        assert torch.equal(grad, before)
    for mine, other in zip(*results, strict=True):
        assert mine.stride() == other.stride()
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", OPTIONS)
def test_shared_memory(kind: str) -> None:
    """Parameters that overlap are stepped one after the other; a gradient may be another parameter."""
    results = []
    for make in makers(kind):
        torch.manual_seed(1)
        base, other = torch.randn(20), torch.randn(20)
        values = [base[:12], base[8:], other, base[::3]]
        grads = [torch.randn(12), torch.randn(12), base.clone(), torch.randn(7)]
        run(make, values, grads, **OPTIONS[kind])
        p, q = torch.randn(6), torch.randn(6)
        run(make, [p, q], [q, p], **OPTIONS[kind])
        r = torch.randn(6)
        run(make, [r, torch.zeros(6)], [r, r], **OPTIONS[kind])
        results.append([base, other, p, q, r])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)


def test_one_gradient_for_two() -> None:
    results = []
    for make in makers("SGD"):
        torch.manual_seed(1)
        grad = torch.randn(6)
        results.append(run(make, [torch.ones(6), torch.zeros(6)], [grad, grad], **OPTIONS["SGD"]))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)


def embedding_gradient() -> tuple[nn.Embedding, nn.Linear]:
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)
    linear(embedding(torch.tensor([1, 4, 4]))).square().sum().backward()
    return embedding, linear


def test_sparse_gradient_with_sgd() -> None:
    results = []
    for make in makers("SGD"):
        embedding, linear = embedding_gradient()
        optimiser = make([*embedding.parameters(), *linear.parameters()], lr=0.1)
        optimiser.step()
        results.append([embedding.weight, *linear.parameters()])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)


def test_sparse_gradient_with_adam_is_refused() -> None:
    """With torch's words, and before anything has changed."""
    embedding, linear = embedding_gradient()
    before = linear.weight.detach().clone()
    optimiser = fk.optim.Adam([*linear.parameters(), *embedding.parameters()])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimiser.step()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("kind", OPTIONS)
def test_hyperparameters_that_are_tensors(kind: str) -> None:
    results = []
    for make in makers(kind):
        torch.manual_seed(1)
        options = OPTIONS[kind] | {"lr": torch.tensor(0.1)}
        results.append(run(make, [torch.randn(9)], [torch.randn(9)], foreach=False, **options))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", OPTIONS)
def test_differentiable(kind: str) -> None:
    gradients = []
    for make in makers(kind):
        torch.manual_seed(1)
        start = torch.randn(6, requires_grad=True)
        p = start.clone()
        p.grad = torch.ones(6) * start.detach().abs()
        make([p], **OPTIONS[kind], differentiable=True).step()
        gradients.append(torch.autograd.grad(p.sum(), start)[0])
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_torchs_choice_of_function(kind: str, options: dict[str, bool]) -> None:
    """`fused` and `foreach` are taken as arguments and serve what is left."""
    results = []
    for make in makers(kind):
        torch.manual_seed(1)
        results.append(run(make, [torch.randn(9), torch.randn(9).bfloat16()],
                           [torch.randn(9), torch.randn(9).bfloat16()], **OPTIONS[kind], **options))  # fmt: skip
    torch.testing.assert_close(results[0], results[1])


def test_capturable_is_refused_on_the_cpu() -> None:
    for make in makers("Adam"):
        with pytest.raises(AssertionError, match="capturable=True"):
            run(make, [torch.ones(2)], [torch.ones(2)], capturable=True, foreach=False)


def test_scaling_inside_of_the_step() -> None:
    """A gradient scaler hands its scale to an optimiser with `fused`, and skips a step of infinite gradients."""
    results = []
    for make in makers("SGD"):
        p = nn.Parameter(torch.ones(3))
        optimiser = make([p], lr=0.1, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, float("inf"), 2.0):
            optimiser.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimiser)
            scaler.update()
        results.append(p)
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", OPTIONS)
def test_inference_mode(kind: str) -> None:
    results = []
    for make in makers(kind):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimiser = make([p], **OPTIONS[kind])
        optimiser.step()
        with torch.inference_mode():
            optimiser.step()
        optimiser.step()
        results.append(p)
    torch.testing.assert_close(results[0], results[1])


def test_compiled_step() -> None:
    results = []
    for make in makers("SGD"):
        p = nn.Parameter(torch.ones(5))
        optimiser = make([p], lr=0.1, momentum=0.9)
        step = torch.compile(optimiser.step, backend="eager")
        for _ in range(3):
            p.grad = torch.ones(5)
            step()
        results.append(p)
    torch.testing.assert_close(results[0], results[1])
