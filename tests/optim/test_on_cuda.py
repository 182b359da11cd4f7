# SPDX-License-Identifier: Apache-2.0
"""Parameters on a CUDA device are stepped by the CUDA kernels: which ones, with which state, and what is said without
the kernels. The device is the CPU, and torch's functions stand in for the kernels (tests/cuda has the kernels)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

import fedpai_kernels as fk
from fedpai_kernels import optim
from fedpai_kernels.cuda import library
from tests.optim.steps import CASES, makers, trained

SHAPES = [(3,), (4, 5), (), (2, 3, 3, 3)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each launch stepped."""
    counts: list[int] = []

    def sgd_step(
        params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], first: Sequence[bool],
        **options: Any,
    ) -> None:  # fmt: skip
        counts.append(len(params))
        cuda._check_lists({"params": params, "grads": grads, **({"buffers": buffers} if buffers else {})})
        own: list[Tensor | None] = [None if new else buffer for new, buffer in zip(first, buffers, strict=True)]
        own = own or [None] * len(params)
        settings = {"foreach": False, "fused": False, "has_sparse_grad": False}
        sgd(list(params), list(grads), own, **settings, **options)
        for new, buffer, made in zip(first, buffers, own, strict=False):
            if new:
                assert made is not None
                buffer.copy_(made)

    def adam_step(
        params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
        largest: Sequence[Tensor] = (), *, step: float | Sequence[Tensor], decoupled: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        counts.append(len(params))
        cuda._check_lists({"params": params, "grads": grads, "means": means, "squares": squares})
        numbers = [step] * len(params) if isinstance(step, float) else [float(t) for t in step]
        before = [torch.tensor(float(number) - 1) for number in numbers]
        adam(
            list(params), list(grads), list(means), list(squares), list(largest), before, amsgrad=bool(largest),
            foreach=False, decoupled_weight_decay=decoupled, **options,
        )  # fmt: skip

    cuda = fk.cuda.optim
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(optim, "_is_on_cuda", lambda p: True)
    monkeypatch.setattr(cuda, "_check_lists", lambda lists: check_alike(lists))
    monkeypatch.setattr(cuda, "sgd_step", sgd_step)
    monkeypatch.setattr(cuda, "adam_step", adam_step)
    return counts


def check_alike(lists: dict[str, Sequence[Tensor]]) -> None:
    for tensors in lists.values():
        for t, p in zip(tensors, lists["params"], strict=True):
            assert (t.shape, t.stride(), t.dtype) == (p.shape, p.stride(), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_torchs(launches: list[int], name: str) -> None:
    kind, options = CASES[name]
    ours, torchs = makers(kind)
    values = [torch.randn(shape) for shape in SHAPES]
    grads = [[torch.randn(shape) for shape in SHAPES] for _ in range(3)]
    got = trained(ours, values, grads, **options)
    assert launches == [len(SHAPES)] * 3, "one launch a step"
    expected = trained(torchs, values, grads, foreach=False, **options)
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_what_the_kernels_do_not_take_is_torchs(launches: list[int], kind: str) -> None:
    ours, torchs = makers(kind)
    options: dict[str, Any] = {"lr": 0.1, **({"momentum": 0.9} if kind == "SGD" else {})}

    def made() -> list[nn.Parameter]:
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(4, 6)) for _ in range(5)]
        params[1] = nn.Parameter(params[1].detach().bfloat16())
        params[2] = nn.Parameter(params[2].detach()[:, ::2])
        params[4] = nn.Parameter(params[3].detach()[:])  # shares its memory
        for p in params:
            p.grad = torch.ones_like(p)
        return [*params, nn.Parameter(torch.randn(3))]  # without a gradient

    mine, theirs = made(), made()
    for _ in range(2):
        ours(mine, **options).step()
        torchs(theirs, foreach=False, **options).step()
    assert launches == [2, 2]
    assert all(map(torch.equal, mine, theirs))
    launches.clear()
    optimiser = ours(mine[:1], **options)
    optimiser.step()
    name = "momentum_buffer" if kind == "SGD" else "exp_avg"
    optimiser.state[mine[0]][name] = optimiser.state[mine[0]][name].t().contiguous().t()
    optimiser.step()
    ours(mine[:1], **{**options, "lr": torch.tensor(0.1)}).step()
    assert launches == [1], "state of other strides, and a rate that is a tensor, are torch's"


def test_steps_are_counted_where_torch_counts_them(launches: list[int]) -> None:
    """Parameters that begin later go by their own number; counts on the device are counted there."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimiser = fk.optim.Adam(params, lr=0.1)
    params[0].grad = torch.ones(3)
    optimiser.step()
    params[1].grad = torch.ones(3)
    optimiser.step()
    # Here the host is the device: counts go as tensors, in one launch.
    assert launches == [1, 2]
    assert [float(optimiser.state[p]["step"]) for p in params] == [2, 1]


def test_steps_on_the_host_go_as_numbers(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_counts_on_device", lambda p, step: False)
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    twins = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    pair = fk.optim.Adam(params, lr=0.1), torch.optim.Adam(twins, lr=0.1, foreach=False)
    for begun in (1, 3):
        for p in (*params[:begun], *twins[:begun]):
            p.grad = torch.full((3,), 0.5)
        for optimiser in pair:
            optimiser.step()
    assert launches == [1, 1, 2], "one launch for each number"
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_capture_needs_state(launches: list[int], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    params = [nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    optimiser = makers(kind)[0](params, lr=0.1, **({"momentum": 0.9} if kind == "SGD" else {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"not there yet, and a CUDA graph is being captured: take a step before"):
        optimiser.step()
    assert launches == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimiser.step()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimiser.step()
    assert launches == [1, 1]
    if kind == "Adam":
        monkeypatch.setattr(optim, "_counts_on_device", lambda p, step: False)
        with pytest.raises(RuntimeError, match="counted on the host, without capturable=True"):
            optimiser.step()


def test_without_the_kernels_nothing_is_touched(
    launches: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(optim, "_is_on_cuda", lambda p: True)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "PATH", tmp_path / "libfedpai_cuda.so")
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for optimiser in (fk.optim.SGD([p], lr=0.1, momentum=0.9), fk.optim.Adam([p], lr=0.1)):
        with pytest.raises(fk.cuda.CudaUnavailableError, match="FEDPAI_CUDA=ON"):
            optimiser.step()
        assert torch.equal(p.detach(), torch.ones(3))
        assert not optimiser.state.get(p)
