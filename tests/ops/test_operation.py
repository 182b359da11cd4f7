# SPDX-License-Identifier: Apache-2.0
"""Ops that are called past torch's dispatcher, and when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedpai_kernels.ops import conv2d, registry
from fedpai_kernels.ops.registry import Operation


class Recorded:
    """Counts the calls of an implementation that came without the dispatcher."""

    def __init__(self) -> None:
        self.direct = 0
        self.operation = Operation("widen_bf16", self._implementation)

    def _implementation(self, x: Tensor) -> Tensor:
        self.direct += 1
        return x.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self.operation(x)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def rounded() -> Tensor:
    return torch.arange(8.0).bfloat16()


def test_plain_tensors_go_directly(recorded: Recorded) -> None:
    assert torch.equal(recorded(rounded()), torch.arange(8.0))
    assert torch.equal(recorded(nn.Parameter(rounded(), requires_grad=False)), torch.arange(8.0))
    assert recorded.direct == 2


class Seeing:
    """What the modes have in common: they note each op, and let it happen."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def see(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class SeeingOps(Seeing, TorchDispatchMode):
    __torch_dispatch__ = Seeing.see


class SeeingFunctions(Seeing, TorchFunctionMode):
    __torch_function__ = Seeing.see


@pytest.mark.parametrize("mode", [SeeingOps, SeeingFunctions])
def test_modes_see_the_op(recorded: Recorded, mode: Callable[[], SeeingOps | SeeingFunctions]) -> None:
    with mode() as seen:
        recorded(rounded())
    assert any("widen_bf16" in op for op in seen.ops)
    assert recorded.direct == 0


def test_profilers_see_the_op(recorded: Recorded) -> None:
    with torch.profiler.profile() as profile:
        recorded(rounded())
    assert any(event.key == "fedpai::widen_bf16" for event in profile.key_averages())
    assert recorded.direct == 0


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "widen_bf16" in str(func):
            return "the subclass answered"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_answer_for_themselves(recorded: Recorded) -> None:
    assert recorded(rounded().as_subclass(Subclass)) == "the subclass answered"
    assert recorded.direct == 0


def test_other_devices_are_left_to_the_dispatcher(recorded: Recorded) -> None:
    assert recorded(rounded().to("meta")).device.type == "meta"
    assert recorded.direct == 0


def test_views_with_a_sign_to_turn_are_resolved() -> None:
    """The imaginary part of a conjugate: its memory holds the numbers with the other sign."""
    turned = torch.complex(torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)).conj().imag
    assert turned.is_neg()
    plan = conv2d.Plan.from_mask(torch.rand(5, 3, 3, 3) < 0.5)
    values = torch.randn(plan.nnz)
    result = conv2d.sparse_conv2d(turned, values, plan)
    assert torch.equal(result, conv2d.sparse_conv2d(turned.resolve_neg(), values, plan))


def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = conv2d.Plan.from_mask(torch.rand(6, 4, 3, 3) < 0.4)
    x, values = torch.randn(5, 4, 7, 7), torch.randn(plan.nnz)

    def results() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
        y = conv2d.sparse_conv2d(leaves[0], leaves[1], plan, padding=1)
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    direct = results()
    monkeypatch.setattr(registry, "is_watched_by_torch", lambda: True)
    registered = results()
    assert len(direct) == 3
    assert all(torch.equal(a, b) for a, b in zip(direct, registered, strict=True))
