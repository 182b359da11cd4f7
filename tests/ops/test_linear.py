# SPDX-License-Identifier: Apache-2.0
"""sparse_linear against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fedpai_kernels import Plan, is_batch_last
from fedpai_kernels.ops import sparse_linear
from tests.cases import LINEAR, LinearCase
from tests.checking import LAYOUTS, check_op, differentiate, operands, runs

NAMED = {case.name: case for case in LINEAR}
BLOCKS = ("blocks_3x5", "blocks_8x8_n_not_multiple", "blocks_lost")


@runs(LINEAR)
def test_exact(case: LinearCase, dtype: str, isa: str) -> None:
    check_op(case, dtype, isa, regime="exact", x_layouts=("contiguous",), dy_layouts=("contiguous", "gaps"))


@runs(LINEAR)
def test_rounded(case: LinearCase, dtype: str, isa: str) -> None:
    check_op(case, dtype, isa, regime="rounded", x_layouts=("contiguous",))


@runs([NAMED[name] for name in ("plain", "n_not_multiple", "rank_1", "rank_3", "rank_4", "wide", "heavy_row", *BLOCKS)])
def test_every_layout_of_x_and_dy(case: LinearCase, dtype: str, isa: str, walk: str) -> None:
    check_op(case, dtype, isa, x_layouts=tuple(LAYOUTS), dy_layouts=tuple(LAYOUTS))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "n_is_1", "wide", "heavy_row", *BLOCKS])
def test_threads_right_and_repeatable(
    name: str, threads: int, isa: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    check_op(NAMED[name], "f32", isa)
    numbers = operands(NAMED[name], "f32", "rounded")
    first, again = (differentiate(NAMED[name].sparse, numbers) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(leading: tuple[int, ...], isa: str) -> None:
    case = LinearCase("small", leading=leading, in_features=4, out_features=3, density=0.5)
    numbers = operands(case, "f64", "rounded")
    inputs = tuple(t.requires_grad_() for t in numbers[:3] if t is not None)
    assert gradcheck(case.sparse, inputs)
    assert gradgradcheck(case.sparse, inputs, (numbers.dy.requires_grad_(),))


@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_no_rows_are_as_in_torch(leading: tuple[int, ...]) -> None:
    case = LinearCase("empty", leading=leading)
    numbers = operands(case, "f32", "exact")
    got, expected = differentiate(case.sparse, numbers), differentiate(case.dense, numbers)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


def test_a_matrix_keeps_its_features_first_storage() -> None:
    """Between two sparse layers, (N, F) is stored F, N: what a batch-last (N, C, H, W) flattens to."""
    case = NAMED["n_multiple"]
    x, values, bias, _ = operands(case, "f32", "exact")
    for given in (x, x.t().contiguous().t()):
        y = case.sparse(given, values, bias)
        assert is_batch_last(y)
        assert torch.equal(y, case.dense(x, values, bias))


def test_nan_and_infinity_stay_where_they_are(isa: str) -> None:
    mask = torch.rand(6, 5) < 0.5
    mask[:, 3] = False
    mask[0] = True
    mask[0, 3] = False
    plan = Plan.from_mask(mask)
    values, x = torch.randn(plan.nnz), torch.randn(9, 5)
    expected = sparse_linear(x, values, plan)
    x[:, 3] = float("inf")
    assert torch.equal(sparse_linear(x, values, plan), expected)
    x[4] = float("nan")
    y = sparse_linear(x, values, plan)
    rest = torch.arange(9) != 4
    assert torch.equal(y[rest], expected[rest])
    assert y[4, 0].isnan()


PLAN = Plan.from_mask(torch.ones(4, 3, dtype=torch.bool))
CONV = Plan.from_mask(torch.ones(4, 3, 1, 1, dtype=torch.bool))
X, VALUES = torch.zeros(2, 3), torch.zeros(12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), VALUES, PLAN), TypeError, r"^x: expected a torch.Tensor, got list"),
        ((X, VALUES, None), TypeError, r"^plan: expected a fedpai_kernels.Plan, got NoneType"),
        ((X, VALUES, CONV), ValueError, r"^plan: expected one of kind 'linear', got kind 'conv2d'"),
        ((X[:, :2], VALUES, PLAN), ValueError, r"^x: expected \(\.\.\., 3\), got shape \(2, 2\)"),
        ((X[0, 0], VALUES, PLAN), ValueError, r"^x: expected \(\.\.\., 3\), got shape \(\)"),
        ((X.half(), VALUES, PLAN), TypeError, r"^x: expected dtype .* got torch.float16"),
        ((X.to("meta"), VALUES, PLAN), ValueError, r"^x: expected a CPU or CUDA tensor, got one on meta"),
        ((X, VALUES[1:], PLAN), ValueError, r"^values: expected shape \(12,\)"),
        ((X, VALUES.double(), PLAN), TypeError, r"^values: expected the dtype of x"),
        ((X, VALUES, PLAN, VALUES), ValueError, r"^bias: expected shape \(4,\), got \(12,\)"),
    ],
)
def test_bad_input_is_named(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse_linear(*arguments)  # type: ignore[arg-type]


def test_gradients_only_where_wanted() -> None:
    case = NAMED["plain"]
    x, values, bias, dy = operands(case, "f32", "exact")
    expected = differentiate(case.dense, operands(case, "f32", "exact"))
    wanted: list[tuple[Tensor | None, Tensor | None]] = [(x, expected.dx), (values, expected.dw), (bias, expected.db)]
    for i, (tensor, gradient) in enumerate(wanted):
        inputs = [t.detach().clone().requires_grad_(j == i) for j, (t, _) in enumerate(wanted) if t is not None]
        case.sparse(*inputs).backward(dy)
        assert tensor is not None
        assert gradient is not None
        assert torch.equal(inputs[i].grad, gradient)
