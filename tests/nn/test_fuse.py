# SPDX-License-Identifier: Apache-2.0
"""Which batch norms are fused with the ReLU after them: only those where nothing else can see the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn.fuse import norm_relu_pairs


class Parts(nn.Module):
    """conv, norm and ReLU in the order that `run` gives them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def depends_on_data(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y) if x.sum() > 0 else y


def only_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return m.relu(y) if m.training else y


def keeps_the_norm(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return m.relu(y) + y


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "adjacent": (lambda m, x: m.relu(m.norm(m.conv(x))), 1),
    "norm_read_twice": (keeps_the_norm, 0),
    "relu_used_twice": (lambda m, x: m.relu(m.conv(m.relu(m.norm(m.conv(x))))), 0),
    "norm_used_twice": (lambda m, x: m.norm(m.conv(m.relu(m.norm(m.conv(x))))), 0),
    "functional_relu": (lambda m, x: torch.relu(m.norm(m.conv(x))), 0),
    "something_between": (lambda m, x: m.relu(m.norm(m.conv(x)) + x), 0),
    "norm_is_the_output": (lambda m, x: m.norm(m.relu(m.conv(x))), 0),
    "only_in_training": (only_in_training, 0),
    "two_norms_share_the_relu": (lambda m, x: m.relu(m.norm(x)) + m.relu(m.other(x)), 0),
}


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES.keys())
def test_pairs(run: Callable[[Any, Tensor], Tensor], expected: int) -> None:
    model = Parts(run)
    pairs, reason = norm_relu_pairs(model)
    assert reason == ""
    assert pairs == ([(model.norm, model.relu)] if expected else [])


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES.keys())
def test_the_converted_model_computes_the_same(run: Callable[[Any, Tensor], Tensor], expected: int) -> None:
    model = Parts(run).double()
    nn.init.normal_(model.norm.weight)
    mask = torch.rand(model.conv.weight.shape) < 0.3
    converted = fk.sparsify(model, {"conv": mask})
    with torch.no_grad():
        model.conv.weight.mul_(mask)
    assert isinstance(converted.norm, fk.nn.BatchLastBatchNormReLU2d) == bool(expected)
    for training in (True, False):
        model.train(training)
        converted.train(training)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(converted(x), model(x))


def test_a_model_that_cannot_be_traced_says_so() -> None:
    model = Parts(depends_on_data)
    pairs, reason = norm_relu_pairs(model)
    assert pairs == []
    assert "torch.fx cannot trace the model" in reason
    report = fk.sparsify_(model, {"conv": torch.rand(3, 3, 3, 3) < 0.3})
    assert any("not fused" in note for note in report.notes)
    assert type(model.norm) is fk.nn.BatchLastBatchNorm2d


def test_tracing_leaves_no_trace() -> None:
    calls: list[str] = []

    def run(m: Any, x: Tensor) -> Tensor:
        m.last = x
        m.norm.running_mean.add_(1)
        torch.rand(1)
        return m.relu(m.norm(m.conv(x)))

    model = Parts(run)
    model.conv.register_forward_hook(lambda *_: calls.append("hook"))
    mean, state = model.norm.running_mean.clone(), torch.get_rng_state()
    assert len(norm_relu_pairs(model)[0]) == 1
    assert not hasattr(model, "last")
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert model.training


def test_modules_of_one_sequential() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    pairs, _ = norm_relu_pairs(model)
    assert pairs == [(model[1], model[2])]
