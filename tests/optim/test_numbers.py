# SPDX-License-Identifier: Apache-2.0
"""Fused optimiser steps against torch's, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedpai_kernels as fk
from tests.optim.steps import CASES, assert_as_close_as_torch, leaves, makers, random_run, trained

SHAPES = [(0,), (3, 0), (), (1,), (7,), (8,), (9,), (15,), (16,), (17,), (5, 3, 2, 2), (257,), (20000,)]


def random_values(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape).to(torch.float64) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_rounded(isa: str, name: str, dtype: torch.dtype) -> None:
    values = random_values(SHAPES)
    assert_as_close_as_torch(name, values, random_run(values, 5), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_exact(isa: str, nesterov: bool, maximize: bool, dtype: torch.dtype) -> None:
    """Small integers and powers of two: all bits must agree."""
    options = {
        "lr": 0.5, "momentum": 0.5, "dampening": 0.0 if nesterov else 0.5, "weight_decay": 0.25,
        "nesterov": nesterov, "maximize": maximize,
    }  # fmt: skip
    values = [torch.randint(-8, 9, shape).to(dtype) for shape in SHAPES]
    grads = [[torch.randint(-8, 9, shape).to(dtype) for shape in SHAPES] for _ in range(3)]
    ours, torchs = (trained(make, values, grads, **options) for make in makers("SGD"))
    for mine, other in zip(ours, torchs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", ["sgd_all", "adam_maximize"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=12))
def test_any_sizes(isa: str, name: str, sizes: list[int]) -> None:
    values = random_values([(size,) for size in sizes])
    assert_as_close_as_torch(name, values, random_run(values, 2), torch.float32)


@pytest.mark.parametrize("name", ["sgd_all", "adamw_amsgrad"])
def test_dense_in_any_order(name: str) -> None:
    """Parameters whose elements lie side by side in another order than the dimensions'."""
    shape = (4, 3, 5, 2)
    values = [
        torch.randn(shape).to(torch.float64).contiguous(memory_format=torch.channels_last),
        fk.to_batch_last(torch.randn(shape).to(torch.float64)),
        torch.randn(7, 9).to(torch.float64).t(),
        torch.randn(3, 1, 5).to(torch.float64).as_strided((3, 1, 5), (5, 77, 1)),
    ]
    assert_as_close_as_torch(name, values, random_run(values, 3), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_bits(set_threads: Callable[[int], None], name: str) -> None:
    kind, options = CASES[name]
    values = [torch.randn(n) for n in (3, 50001, 0, 17, 20000, 1000)]
    grads = [[torch.randn_like(v) for v in values] for _ in range(2)]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(trained(makers(kind)[0], values, grads, **options))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_factors_of_zero_are_skipped(isa: str) -> None:
    """Without weight decay an infinite parameter is not multiplied by 0; without momentum there is no buffer."""
    (p,) = leaves([torch.tensor([float("inf"), 1.0, -1.0])])
    p.grad = torch.ones(3)
    optimiser = fk.optim.SGD([p], lr=0.5)
    optimiser.step()
    assert p.tolist() == [float("inf"), 0.5, -1.5]
    assert not optimiser.state


@pytest.mark.parametrize("name", CASES)
def test_nan_and_infinity_go_where_torch_sends_them(isa: str, name: str) -> None:
    kind, options = CASES[name]
    values = [torch.randn(40)]
    grads = [[torch.randn(40)] for _ in range(3)]
    grads[1][0][3], grads[1][0][20], values[0][30] = float("nan"), float("inf"), float("inf")
    ours, torchs = (trained(make, values, grads, **options) for make in makers(kind))
    for mine, other in zip(ours[2], torchs[2], strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
        assert torch.equal(mine.isinf(), other.isinf())
