# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: the case list in all directions against float64 on the CPU; repeated; in graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk
from tests.cases import CONV2D, LINEAR, Case
from tests.checking import Operands, differentiate, operands, stacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fk.cuda.is_available(), reason="no GPU, or no libfedpai_cuda.so"),
]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CASES: Sequence[Case] = (*CONV2D, *LINEAR)


@pytest.fixture(autouse=True)
def _by_the_cuda_kernels() -> Iterator[None]:
    """Not by whatever is fastest."""
    with fk.dispatch.backend("sparse"):
        yield


def on_gpu(given: Operands, dtype: torch.dtype) -> Operands:
    """Images of this dtype, weights of float32."""
    bias = None if given.bias is None else given.bias.cuda()
    return Operands(given.x.to("cuda", dtype), given.values.cuda(), bias, given.dy.to("cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_exact(case: Case, dtype: str) -> None:
    """Small integers: every sum is exact in float32, so results are the float64 ones, rounded once."""
    given = operands(case, "f32", "exact")
    if case.longest_sum * 16 >= 2**24:
        pytest.skip("its sums are not exact in float32")
    expected = differentiate(case.dense, given.to(torch.float64))
    got = differentiate(case.sparse, on_gpu(given, DTYPES[dtype]))
    for name, value, truth in zip(got._fields, got, expected, strict=True):
        if value is None:
            assert truth is None
            continue
        assert truth is not None
        assert torch.equal(value.cpu(), truth.to(value.dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_clients_are_exact(case: Case, dtype: str) -> None:
    """Each client's part of one launch; their operands differ in all but the mask."""
    clients = [operands(case, "f32", "exact", client) for client in range(5)]
    if case.longest_sum * 16 >= 2**24:
        pytest.skip("its sums are not exact in float32")
    got = differentiate(case.sparse, on_gpu(stacked(clients), DTYPES[dtype]))
    for client, own in enumerate(clients):
        expected = differentiate(case.dense, own.to(torch.float64))
        for name, value, truth in zip(got._fields, got, expected, strict=True):
            assert (value is None) == (truth is None)
            if value is not None and truth is not None:
                assert torch.equal(value[client].cpu(), truth.to(value.dtype)), f"{name} of client {client}"


@pytest.mark.parametrize("case", CONV2D[:20], ids=lambda case: case.name)
def test_clients_have_the_bits_of_calls_of_their_own(case: Case) -> None:
    """But for the gradients of values and bias, whose sums are split by the number of clients."""
    clients = [on_gpu(operands(case, "f32", "rounded", client), torch.float32) for client in range(3)]
    got = differentiate(case.sparse, stacked(clients))
    for client, own in enumerate(clients):
        alone = differentiate(case.sparse, own)
        assert torch.equal(got.fwd[client], alone.fwd)
        assert torch.equal(got.dx[client], alone.dx)
        torch.testing.assert_close(got.dw[client], alone.dw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CONV2D[:20], ids=lambda case: case.name)
def test_same_bits_twice(case: Case) -> None:
    given = on_gpu(operands(case, "f32", "rounded"), torch.float32)
    first, second = (differentiate(case.sparse, given) for _ in range(2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("clients", [(), (5,)], ids=["one", "several"])
def test_replayed_graph_is_eager(clients: tuple[int, ...]) -> None:
    """All three directions, captured, with values changed in place before the replay."""
    plan = fk.Plan.from_mask(torch.rand(16, 8, 3, 3) < 0.1)
    x, values = torch.randn(*clients, 32, 8, 9, 9, device="cuda"), torch.randn(*clients, plan.nnz, device="cuda")
    x.requires_grad_(), values.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = fk.ops.sparse_conv2d(x, values, plan, None, 1, 1)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), (x, values)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        values.mul_(2)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.parametrize("compensated", [False, True])
def test_merging_has_the_bits_of_the_cpu(compensated: bool) -> None:
    clients, n = 7, 50001
    weights = [float(k + 1) for k in range(clients)]
    vectors, old = torch.randn(clients, n), torch.randn(n)
    mean = fk.cuda.weighted_mean(vectors.cuda(), weights, compensated=compensated)
    assert torch.equal(mean.cpu(), fk.aggregate.weighted_mean(list(vectors), weights, compensated=compensated))
    masks = [torch.rand(n) < 0.1 for _ in range(clients)]
    at = [mask.nonzero().flatten().int() for mask in masks]
    own = [vector[mask] for vector, mask in zip(vectors, masks, strict=True)]
    positions = fk.cuda.Positions([places.cuda() for places in at], n)
    merged = fk.cuda.masked_mean(old.cuda(), torch.cat(own).cuda(), positions, weights, compensated=compensated)
    assert torch.equal(merged.cpu(), fk.aggregate.masked_mean(old, own, at, weights, compensated=compensated))
    bitmaps = torch.randint(0, 256, (clients, 1001), dtype=torch.uint8)
    assert torch.equal(fk.cuda.majority(bitmaps.cuda(), 3).cpu(), fk.aggregate.majority(list(bitmaps), 3))


def test_wrong_positions_are_refused() -> None:
    good, bad = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([5, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^positions\[1\]: expected ascending"):
        fk.cuda.Positions([good.cuda(), bad.cuda()], 9)


def test_steps_are_those_of_the_cpu() -> None:
    """SGD to the bit where the CPU fuses multiply-adds, Adam to its last one."""
    shapes = [(3,), (2048,), (64, 33), (1,)]
    params, grads, state, squares = ([torch.rand(*shape) for shape in shapes] for _ in range(4))
    moved = [[t.cuda() for t in tensors] for tensors in (params, grads, state, squares)]
    fk.cuda.sgd_step(moved[0], moved[1], moved[2], [False] * 4, lr=0.1, momentum=0.9, weight_decay=0.01)
    fk.cuda.adam_step(
        moved[0], moved[1], moved[2], moved[3], step=3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1
    )
    twins = [torch.nn.Parameter(p.clone()) for p in params]
    for twin, grad in zip(twins, grads, strict=True):
        twin.grad = grad
    sgd = fk.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=0.01)
    for twin, buffer in zip(twins, state, strict=True):
        sgd.state[twin]["momentum_buffer"] = buffer
    sgd.step()
    adam = fk.optim.Adam(twins, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for twin, mean, square in zip(twins, state, squares, strict=True):
        adam.state[twin] = {"step": torch.tensor(2.0), "exp_avg": mean, "exp_avg_sq": square}
    adam.step()
    for own, twin in zip(moved[0], twins, strict=True):
        torch.testing.assert_close(own.cpu(), twin.detach(), rtol=1e-6, atol=1e-7)
