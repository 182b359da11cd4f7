# SPDX-License-Identifier: Apache-2.0
"""Batch norm and the server's steps on a GPU: against float64 on the CPU and against the CPU's kernels; repeated; in
graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk
from fedpai_kernels.ops.activation import Activation
from fedpai_kernels.ops.norm import batch_norm
from tests.ops.activations import ALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fk.cuda.is_available(), reason="no GPU, or no libfedpai_cuda.so"),
]
# Rows of one block and of many, walked whole and in pieces, in fours and not.
SHAPES = {"short": (65, 3, 9, 7), "pieces": (64, 8, 32, 32), "whole": (64, 256, 8, 8), "odd": (33, 5, 65, 31)}

Results = list[Tensor]


def step(x: Tensor, dy: Tensor, r: Tensor | None, activation: Activation, training: bool) -> Results:
    """y, the statistics after it, and the gradients of everything."""
    channels, parameters = x.shape[1], {"device": x.device, "dtype": torch.float32 if x.is_cuda else x.dtype}
    weight, bias, mean, var = (torch.linspace(0.5, 1.5, channels, **parameters) for _ in range(4))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *([] if r is None else [r]))]
    y = batch_norm(
        leaves[0], mean, var, leaves[1], leaves[2], training, activation=activation,
        residual=leaves[3] if r is not None else None,
    )  # fmt: skip
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "sum"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["none", *ALL])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape: tuple[int, ...], name: str, training: bool, residual: bool, dtype: torch.dtype) -> None:
    """Multiples of 1/64, which every dtype holds; the CPU's float64 kernel is the reference."""
    draw = torch.Generator().manual_seed(0)
    x, dy, r = (torch.randint(-128, 129, shape, generator=draw) / 64 for _ in range(3))
    activation = ALL[name][0] if name in ALL else Activation("none")
    expected = step(x.double(), dy.double(), r.double() if residual else None, activation, training)
    moved = [fk.to_batch_last(t.to("cuda", dtype)) for t in (x, dy, r)]
    got = step(moved[0], moved[1], moved[2] if residual else None, activation, training)
    again = step(moved[0], moved[1], moved[2] if residual else None, activation, training)
    assert all(map(torch.equal, got, again)), "other bits the second time"
    count = x.numel() // x.shape[1]
    for i, (value, truth) in enumerate(zip(got, expected, strict=True)):
        of_sums = i in (4, 5)
        eps = 2**-8 if dtype == torch.bfloat16 and (value.dim() == 4 or of_sums) else 2**-20
        limit = eps * (float(truth.abs().max()) + 4 * (count**0.5 if of_sums else 1))
        off = (value.cpu().double() - truth).abs()
        # Rounded to bfloat16, an element of a sum just below 6 is at it.
        allowed = off.numel() // 100 if dtype == torch.bfloat16 and name == "relu6" and residual and i > 2 else 0
        assert int((off > limit).sum()) <= allowed, (i, float(off.max()), limit)


def replayed(call: Callable[[], Results]) -> tuple[Results, torch.cuda.CUDAGraph]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return captured, graph


def test_replayed_graph_is_eager() -> None:
    """Forward and backward, captured, with the input changed in place before the replay."""
    x, dy = (fk.to_batch_last(torch.randn(32, 8, 16, 16, device="cuda")) for _ in range(2))

    def call() -> Results:
        return step(x, dy, None, Activation("relu"), True)

    captured, graph = replayed(call)
    x.mul_(2).add_(1)
    graph.replay()
    assert all(map(torch.equal, captured, call()))


def test_fused_chain_is_that_of_the_cpu() -> None:
    """norm_conv2d, whose normalised activation is not kept, against the CPU's."""
    from fedpai_kernels.ops.norm_conv2d import norm_conv2d

    torch.manual_seed(0)
    plan = fk.Plan.from_mask(torch.rand(16, 8, 3, 3) < 0.2)
    x, values, weight, bias = torch.randn(32, 8, 9, 9), torch.randn(plan.nnz), torch.randn(8), torch.randn(8)
    dy = torch.randn(32, 16, 9, 9)

    def results(device: str) -> list[Any]:
        own = [copy.deepcopy(t).to(device).requires_grad_() for t in (x, weight, bias, values)]
        y = norm_conv2d(own[0], None, None, own[1], own[2], True, 0.1, 1e-5, own[3], plan, None, 1, 1, relu=True)
        return [y.detach(), *torch.autograd.grad(y, own, dy.to(device))]

    for value, truth in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(value.cpu(), truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rule", fk.aggregate.RULES)
def test_server_steps_have_the_bits_of_the_cpu(rule: str) -> None:
    torch.manual_seed(0)
    old, merged, m, v = torch.randn(50001), torch.randn(50001), torch.randn(50001), torch.rand(50001)
    state = [m] if rule == "avgm" else [m, v]
    moved = [t.cuda() for t in state]
    new = fk.cuda.server_step(rule, old.cuda(), merged.cuda(), *moved, lr=0.3, beta1=0.9)
    assert torch.equal(new.cpu(), fk.aggregate.server_step(rule, old, merged, *state, lr=0.3, beta1=0.9))
    assert all(torch.equal(own.cpu(), kept) for own, kept in zip(moved, state, strict=True))
    with pytest.raises(ValueError, match=r"^m: .* no memory with old"):
        fk.cuda.server_step("avgm", moved[0], moved[0].clone(), moved[0], lr=0.3, beta1=0.9)
