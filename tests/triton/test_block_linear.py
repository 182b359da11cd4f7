# SPDX-License-Identifier: Apache-2.0
"""Block-sparse linear layers: every block case, gradients included, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fedpai_kernels import is_batch_last
from fedpai_kernels.triton import block_linear
from tests.cases import BLOCK_LINEAR, LinearCase
from tests.checking import operands
from tests.triton.checking import DEVICE, check_block_op, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize("case", BLOCK_LINEAR, ids=lambda case: case.name)
def test_exact(case: LinearCase) -> None:
    check_block_op(case, "f32", x_layout="contiguous", dy_layouts=("contiguous", "expanded"))


@pytest.mark.parametrize("case", BLOCK_LINEAR, ids=lambda case: case.name)
def test_rounded_to_half(case: LinearCase) -> None:
    check_block_op(case, "f16", regime="rounded", dy_layouts=("gaps",))


def test_results_are_stored_as_x() -> None:
    case = BLOCK_LINEAR[0]
    x, values, bias, _ = (t.to(DEVICE) for t in operands(case, "f32", "exact"))
    rows = block_linear(x, values, case.plan, bias)
    assert rows.is_contiguous()
    columns = block_linear(x.t().contiguous().t(), values, case.plan, bias)
    assert is_batch_last(columns)
    assert torch.equal(rows, columns)
