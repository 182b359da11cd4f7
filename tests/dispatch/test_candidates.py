# SPDX-License-Identifier: Apache-2.0
"""Every candidate that runs on the CPU computes the same ops: the case list, in all directions, against float64."""

from __future__ import annotations

import pytest
import torch

import fedpai_kernels as fk
from fedpai_kernels.cuda import library
from fedpai_kernels.dispatch import candidates
from fedpai_kernels.dispatch.candidates import BLOCKS, DENSE, SPARSE, Candidate
from fedpai_kernels.ops import conv2d, conv2d_kernels
from tests.cases import CONV2D, LINEAR, Case
from tests.checking import differentiate, operands, stacked
from tests.dispatch import stand_ins


@pytest.fixture
def by_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d, "conv2d_forward", DENSE.forward)
    monkeypatch.setattr(conv2d, "conv2d_input_grad", DENSE.input_grad)
    monkeypatch.setattr(conv2d, "conv2d_weight_grad", DENSE.weight_grad)
    monkeypatch.setattr(conv2d, "has_backward", lambda t: False)


@pytest.mark.usefixtures("by_dense")
@pytest.mark.parametrize("case", [*CONV2D, *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_dense_is_exact(case: Case) -> None:
    """Small integers: sums are exact, so the results are equal; and they are stored as the registered op says."""
    given = operands(case, "f64", "exact")
    expected = differentiate(case.dense, given)
    got = differentiate(case.sparse, given)
    for name, value, truth in zip(got._fields, got, expected, strict=True):
        assert (value is None) == (truth is None)
        if value is not None and truth is not None:
            assert value.dtype == truth.dtype
            assert torch.equal(value, truth), name


@pytest.mark.usefixtures("by_dense")
@pytest.mark.parametrize("case", [*CONV2D, *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_dense_is_exact_for_clients(case: Case) -> None:
    clients = [operands(case, "f64", "exact", client) for client in range(3)]
    got = differentiate(case.sparse, stacked(clients))
    assert case.op == "linear" or fk.is_batch_last(got.fwd)
    for client, own in enumerate(clients):
        for name, value, truth in zip(got._fields, got, differentiate(case.dense, own), strict=True):
            assert (value is None) == (truth is None)
            if value is not None and truth is not None:
                assert torch.equal(value[client], truth), f"{name} of client {client}"


@pytest.mark.parametrize("candidate", [DENSE, stand_ins.SPARSE], ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("kind", ["conv2d", "pointwise"])
def test_results_are_batch_last(candidate: Candidate, kind: str) -> None:
    kernel = 3 if kind == "conv2d" else 1
    plan = fk.Plan.from_mask(torch.rand(6, 4, kernel, kernel) < 0.5)
    geometry = [1, 1, kernel // 2, kernel // 2, kernel // 2, kernel // 2, 1, 1]
    x, dy, values = torch.randn(5, 4, 7, 6), torch.randn(5, 6, 7, 6), torch.randn(plan.nnz)
    y = candidate.forward(x, values, None, plan.handle, geometry)
    dx = candidate.input_grad(dy, values, plan.handle, 7, 6, geometry)
    assert fk.is_batch_last(y)
    assert fk.is_batch_last(dx)
    dvalues, dbias = candidate.weight_grad(x, dy, plan.handle, False, geometry)
    assert (dvalues.shape, dbias.shape) == ((plan.nnz,), (0,))


@pytest.mark.parametrize("kernel", [1, 3])
def test_dense_in_bfloat16(kernel: int) -> None:
    """Images of bfloat16, values and their gradients of float32."""
    plan = fk.Plan.from_mask(torch.rand(6, 4, kernel, kernel) < 0.5)
    geometry = [1, 1, *(kernel // 2,) * 4, 1, 1]
    x, dy = stand_ins.integers(5, 4, 7, 6).bfloat16(), stand_ins.integers(5, 6, 7, 6).bfloat16()
    values, bias = stand_ins.integers(plan.nnz), stand_ins.integers(6)
    y = DENSE.forward(x, values, bias, plan.handle, geometry)
    dx = DENSE.input_grad(dy, values, plan.handle, 7, 6, geometry)
    dvalues, dbias = DENSE.weight_grad(x, dy, plan.handle, True, geometry)
    assert [t.dtype for t in (y, dx, dvalues, dbias)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected = conv2d_kernels._forward_cpu(x.float(), values, bias, plan.handle, geometry)
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=0)
    exact = conv2d_kernels._weight_grad_cpu(x.float(), dy.float(), plan.handle, True, geometry)
    torch.testing.assert_close(dvalues, exact[0], rtol=2**-8, atol=0)
    assert torch.equal(dbias, exact[1])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, images = fk.Plan.from_mask(torch.rand(8, 8, 3, 3) < 0.3), torch.ones(2, 8, 4, 4)
    monkeypatch.setattr(library, "load", lambda: None)
    SPARSE.check(plan, images)
    with pytest.raises(TypeError, match=r"float32 and bfloat16 images, got torch.float64"):
        SPARSE.check(plan, images.double())
    monkeypatch.setattr(candidates, "HALF_OR_SINGLE", candidates.HALF_OR_SINGLE._replace(check_device=lambda x: None))
    with pytest.raises(ValueError, match="not made of whole blocks"):
        BLOCKS.check(plan, images)
    blocky = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
    blocky[:16, 16:, 1, 1] = True
    BLOCKS.check(fk.Plan.from_mask(blocky), images)
    with pytest.raises(TypeError, match=r"float16 and bfloat16 images, got torch.float64"):
        BLOCKS.check(fk.Plan.from_mask(blocky), images.double())
