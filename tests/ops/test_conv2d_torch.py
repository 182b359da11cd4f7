# SPDX-License-Identifier: Apache-2.0
"""sparse_conv2d among torch's own functions: derivatives, modes, unusual tensors, and input that it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fedpai_kernels import Plan, to_batch_last
from fedpai_kernels.ops import sparse_conv2d
from tests.cases import Conv2dCase, conv2d_named
from tests.checking import differentiate, operands

SMALL = [
    Conv2dCase("small", batch=2, in_channels=2, out_channels=3, image=(4, 3), density=0.5),
    Conv2dCase("small_strided", batch=2, in_channels=2, out_channels=2, image=(4, 5), stride=2, dilation=(1, 2)),
    Conv2dCase("small_groups", batch=3, in_channels=4, out_channels=2, image=(3, 3), groups=2, density=0.6),
    Conv2dCase("small_1x1", batch=2, in_channels=2, out_channels=3, image=(3, 4), kernel=(1, 1), padding=0, bias=False),
]


# ------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck_and_gradgradcheck(case: Conv2dCase, isa: str) -> None:
    numbers = operands(case, "f64", "rounded")
    inputs = tuple(t.requires_grad_() for t in numbers[:3] if t is not None)

    def op(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return case.sparse(x, values, bias)

    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs, (numbers.dy.requires_grad_(),))


@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("large_output", batch=64, in_channels=6, out_channels=33, image=(32, 32), density=0.2),
        Conv2dCase("large_input", batch=48, in_channels=43, out_channels=2, image=(32, 32), density=0.2),
    ],
    ids=lambda case: case.name,
)
def test_results_too_large_for_the_caches(case: Conv2dCase, isa: str) -> None:
    numbers = operands(case, "f32", "exact")
    batch_last = numbers._replace(x=to_batch_last(numbers.x), dy=to_batch_last(numbers.dy))
    expected = differentiate(case.dense, numbers)
    got = differentiate(case.sparse, batch_last)
    for name in ("fwd", "dx", "dw", "db"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    case = conv2d_named("plain")
    numbers = operands(case, "f32", "exact")
    expected = differentiate(case.dense, numbers)
    inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(numbers[:3]) if t is not None]
    case.sparse(*inputs).backward(numbers.dy)
    for i, gradient in enumerate((expected.dx, expected.dw, expected.db)):
        if i in wanted:
            assert torch.equal(inputs[i].grad, gradient)
        else:
            assert inputs[i].grad is None


def test_no_grad_and_inference_mode() -> None:
    case = conv2d_named("plain")
    x, values, bias, _ = operands(case, "f32", "exact")
    values.requires_grad_()
    expected = case.dense(x, values, bias)
    with torch.no_grad():
        y = case.sparse(x, values, bias)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        y = case.sparse(x, values, bias)
        assert y.is_inference()
        assert torch.equal(y, expected)


def test_changing_a_saved_operand_in_place_is_an_error() -> None:
    case = conv2d_named("plain")
    x, values, bias, dy = operands(case, "f32", "exact")
    values.requires_grad_()
    y = case.sparse(x, values, bias)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_an_image_without_batch() -> None:
    case = conv2d_named("plain")
    x, values, bias, dy = operands(case, "f32", "exact")
    for one in (x[0], x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        inputs = [t.clone().requires_grad_() for t in (one, values, bias)]
        twins = [t.clone().requires_grad_() for t in (one, values, bias)]
        y, expected = case.sparse(*inputs), case.dense(*twins)
        assert torch.equal(y, expected)
        y.backward(dy[0])
        expected.backward(dy[0])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, twins, strict=True))


def test_a_batch_of_no_images_is_as_in_torch(isa: str) -> None:
    case = conv2d_named("stride_2_odd_size")
    full = operands(case, "f32", "exact")
    for layout in (lambda t: t, to_batch_last):
        empty = full._replace(x=layout(full.x[:0]), dy=full.dy[:0])
        got, expected = differentiate(case.sparse, empty), differentiate(case.dense, empty)
        assert got.fwd.shape == expected.fwd.shape == (0, *full.dy.shape[1:])
        assert got.dx.shape == empty.x.shape
        assert torch.equal(got.dw, torch.zeros_like(full.values))
        assert torch.equal(got.db, torch.zeros_like(full.bias))


def test_a_negated_view_is_read_as_what_it_means() -> None:
    case = conv2d_named("plain")
    _, values, bias, _ = operands(case, "f32", "exact")
    x = torch.view_as_complex(torch.randint(-4, 5, (*case.input_shape, 2)).float()).conj().imag
    assert x.is_neg()
    assert torch.equal(case.sparse(x, values, bias), case.dense(x, values, bias))


def test_autocast_does_not_change_the_op() -> None:
    """float32 operands stay float32; what autocast made bfloat16 before is refused, not misread.

    The modules of fedpai_kernels.nn cast their input, as plain modules under autocast do.
    """
    case = conv2d_named("plain")
    x, values, bias, _ = operands(case, "f32", "exact")
    expected = case.dense(x, values, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.sparse(x, values, bias)
        assert y.dtype == torch.float32
        assert torch.equal(y, expected)
        with pytest.raises(TypeError, match=r"x: expected dtype .* got torch\.bfloat16"):
            case.sparse(x.bfloat16(), values, bias)


# --------------------------------------------------------------------------------------------------- bad input


PLAN = Plan.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
GROUPED = Plan.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool), groups=2)
LINEAR = Plan.from_mask(torch.ones(4, 3, dtype=torch.bool))
X, VALUES, BIAS = torch.zeros(2, 3, 6, 6), torch.zeros(PLAN.nnz), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.numpy(), VALUES, PLAN), TypeError, r"^x: expected a torch.Tensor, got ndarray"),
        ((X, None, PLAN), TypeError, r"^values: expected a torch.Tensor, got NoneType"),
        ((X, VALUES, torch.ones(4, 3, 3, 3)), TypeError, r"^plan: expected a fedpai_kernels.Plan, got Tensor"),
        ((X, VALUES, PLAN, 1.0), TypeError, r"^bias: expected a torch.Tensor, got float"),
        ((X.bfloat16(), VALUES, PLAN), TypeError, r"^x: expected dtype torch.float32 or torch.float64, got"),
        ((X.int(), VALUES, PLAN), TypeError, r"^x: expected dtype .* got torch.int32"),
        ((X, VALUES.double(), PLAN), TypeError, r"^values: expected the dtype of x, torch.float32, got torch.float64"),
        ((X, VALUES, PLAN, BIAS.double()), TypeError, r"^bias: expected the dtype of x"),
        ((X.to("meta"), VALUES, PLAN), ValueError, r"^x: expected a CPU or CUDA tensor, got one on meta"),
        ((X, VALUES.to("meta"), PLAN), ValueError, r"^values: expected the device of x, cpu, got meta"),
        ((X.to_sparse(), VALUES, PLAN), TypeError, r"^x: expected a dense tensor, got one of layout torch.sparse_coo"),
        ((X, VALUES[1:], PLAN), ValueError, r"^values: expected shape \(108,\), one per surviving weight"),
        ((X, PLAN.unpack(VALUES), PLAN), ValueError, r"^values: expected shape \(108,\)"),
        ((X, VALUES, PLAN, BIAS[1:]), ValueError, r"^bias: expected shape \(4,\), got \(3,\)"),
        ((X[:, :2], VALUES, PLAN), ValueError, r"^x: expected 3 channels, got shape \(2, 2, 6, 6\)"),
        ((X[0, 0], VALUES, PLAN), ValueError, r"^x: expected \(N, C, H, W\) or \(C, H, W\), got shape \(6, 6\)"),
        ((X[:, :, :0], VALUES, PLAN), ValueError, r"^x: an image needs at least one pixel, got shape \(2, 3, 0, 6\)"),
        ((X[:, :, :2], VALUES, PLAN), ValueError, r"^x: an image of 2 x 6 is too small for a kernel of 3 x 3"),
        ((X, VALUES[:12], LINEAR), ValueError, r"^plan: expected one of kind 'conv2d', got kind 'linear'"),
        ((X, VALUES, PLAN, None, 1, 0, 1, 3), ValueError, r"^groups: the plan was made for 1, got 3"),
        ((X, VALUES, GROUPED), ValueError, r"^groups: the plan was made for 2, got 1"),
        ((X, VALUES, PLAN, None, 0), ValueError, r"^stride: expected .* got 0"),
        ((X, VALUES, PLAN, None, 1.5), ValueError, r"^stride: expected .* got 1.5"),
        ((X, VALUES, PLAN, None, (1, 2, 3)), ValueError, r"^stride: expected .* got \(1, 2, 3\)"),
        ((X, VALUES, PLAN, None, 2**40), ValueError, r"^stride: expected .* got 1099511627776"),
        ((X, VALUES, PLAN, None, 1, -1), ValueError, r"^padding: expected .* got -1"),
        ((X, VALUES, PLAN, None, 1, "full"), ValueError, r"^padding: expected 'same', 'valid'.* got 'full'"),
        ((X, VALUES, PLAN, None, 2, "same"), ValueError, r"^padding: 'same' needs stride 1, got stride \(2, 2\)"),
        ((X, VALUES, PLAN, None, 1, 0, 0), ValueError, r"^dilation: expected .* got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse_conv2d(*arguments)  # type: ignore[arg-type]
