# SPDX-License-Identifier: Apache-2.0
"""The reference is judged by plain sums over the non-zeros, written from the definition."""

from __future__ import annotations

import pytest
import torch

from fedpai_kernels.ops import reference
from tests.cases import CONV2D, LINEAR, Case
from tests.checking import differentiate, direct, operands

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("case", [*CONV2D, *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_reference_is_the_definition(case: Case) -> None:
    numbers = operands(case, "f64", "exact")
    got, expected = differentiate(case.dense, numbers), direct(case, numbers)
    for direction, result in got._asdict().items():
        if result is not None:
            assert (result.numpy() == getattr(expected, direction)).all(), direction


def test_reference_is_differentiable_in_any_dtype() -> None:
    case = LINEAR[0]
    x, values, bias, _ = operands(case, "f32", "exact")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        leaf = values.detach().to(dtype, copy=True).requires_grad_()
        y = reference.linear(x.to(dtype), leaf, case.plan, None if bias is None else bias.to(dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
