# SPDX-License-Identifier: Apache-2.0
"""Tensors on a CUDA device are merged by the CUDA kernels: what is handed to them, and what is refused before. The
device is the CPU, and the CPU's kernels stand in (tests/cuda has the CUDA kernels, and their bits)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk
from fedpai_kernels import aggregate


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call."""
    seen: list[Any] = []
    host = {name: getattr(aggregate, name) for name in ("weighted_mean", "masked_mean", "majority")}

    def on_host(name: str, *arguments: Any, **options: Any) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(aggregate, "_are_on_cuda", lambda vectors: False)
            result: Tensor = host[name](*arguments, **options)
        return result

    def weighted_mean(rows: Tensor, weights: list[float], compensated: bool) -> Tensor:
        seen.append((rows, weights, compensated))
        return on_host("weighted_mean", list(rows), weights, compensated=compensated)

    def masked_mean(old: Tensor, values: Tensor, at: Any, weights: list[float], compensated: bool) -> Tensor:
        seen.append((values, at, weights, compensated))
        own = list(values.split([len(places) for places in at[0]]))
        return on_host("masked_mean", old, own, at[0], weights, compensated=compensated)

    def majority(rows: Tensor, threshold: int) -> Tensor:
        seen.append((rows, threshold))
        return on_host("majority", list(rows), threshold)

    stand_in = SimpleNamespace(
        weighted_mean=weighted_mean, masked_mean=masked_mean, majority=majority, Positions=lambda at, n: (at, n)
    )
    monkeypatch.setattr(aggregate, "_cuda", lambda: stand_in)
    monkeypatch.setattr(aggregate, "_are_on_cuda", lambda vectors: len(vectors) > 0)
    return seen


def test_weighted_mean(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, weights = torch.randn(3, 7), [1.0, 2.0, 3.0]
    got = fk.aggregate.weighted_mean(list(vectors), weights, compensated=True)
    matrix = fk.aggregate.weighted_mean(vectors, weights, compensated=True)  # type: ignore[arg-type]
    assert torch.equal(asked[0][0], vectors)
    assert asked[1][0] is vectors, "a matrix is handed on as it is"
    assert [call[2] for call in asked] == [True, True]
    monkeypatch.undo()
    expected = fk.aggregate.weighted_mean(list(vectors), weights, compensated=True)
    assert torch.equal(got, expected)
    assert torch.equal(matrix, expected)


def test_masked_mean_and_majority(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    old = torch.randn(9)
    at = [torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)]
    own = [torch.randn(3), torch.randn(1)]
    bitmaps = [torch.tensor([3, 1], dtype=torch.uint8), torch.tensor([1, 2], dtype=torch.uint8)]
    got = fk.aggregate.masked_mean(old, own, at, [1, 2]), fk.aggregate.majority(bitmaps, 2)
    assert len(asked) == 2
    monkeypatch.undo()
    assert torch.equal(got[0], fk.aggregate.masked_mean(old, own, at, [1, 2]))
    assert torch.equal(got[1], fk.aggregate.majority(bitmaps, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, v, i: a.weighted_mean([v, v[:2]], [1, 1]), ValueError, r"vectors\[1\]: 2 elements and the 3 of"),
        (lambda a, v, i: a.weighted_mean([v, v.double()], [1, 1]), TypeError, r"vectors\[1\]: got torch.float64"),
        (lambda a, v, i: a.weighted_mean([v, v.to("meta")], [1, 1]), ValueError, r"vectors\[1\]: got a tensor on meta"),
        (lambda a, v, i: a.weighted_mean([v, v.numpy()], [1, 1]), TypeError, r"vectors\[1\]: got ndarray"),
        (lambda a, v, i: a.weighted_mean([v, v], [1]), ValueError, r"weights: got 1 for 2 vectors"),
        (lambda a, v, i: a.weighted_mean([v, v], [1, -1]), ValueError, r"weights\[1\]: got -1"),
        (lambda a, v, i: a.masked_mean(v, [v, v], [i], [1, 1]), ValueError, r"positions: got 1 arrays for 2 vectors"),
        (lambda a, v, i: a.masked_mean(v, [v], [i[:1]], [1]), ValueError, r"positions\[0\]: got 1 for the 3 values"),
        (lambda a, v, i: a.majority([v], 1), TypeError, r"bitmaps\[0\]: got torch.float32"),
    ],
)
def test_bad_arguments(asked: list[Any], call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        call(fk.aggregate, torch.ones(3), torch.arange(3, dtype=torch.int32))
    assert asked == []
