# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolution: every block case, gradients included, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fedpai_kernels import Plan, is_batch_last, to_batch_last
from fedpai_kernels.ops import reference
from fedpai_kernels.triton import block_conv2d, launch
from tests.cases import BLOCK_CONV2D, Conv2dCase
from tests.checking import differentiate, operands
from tests.triton.checking import DEVICE, block_op, check_block_op, moved, needs_kernels

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore:Using padding='same'")]

BY_NAME = {case.name: case for case in BLOCK_CONV2D}
# Those that take another way through lists and kernels.
VARIED = [
    BY_NAME[name] for name in ("plain", "ragged", "stride_2_odd_size", "stride_above_image", "groups_2_ragged_strided")
]


def named(case: Conv2dCase) -> str:
    return case.name


@pytest.mark.parametrize("case", BLOCK_CONV2D, ids=named)
def test_exact(case: Conv2dCase) -> None:
    check_block_op(case, "f32")


@pytest.mark.parametrize("case", BLOCK_CONV2D, ids=named)
def test_rounded_to_half(case: Conv2dCase) -> None:
    check_block_op(case, "f16", regime="rounded", x_layout="channels_last", dy_layouts=("contiguous",))


@pytest.mark.parametrize("case", VARIED, ids=named)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_exact_in_16_bits(case: Conv2dCase, dtype: str) -> None:
    check_block_op(case, dtype)


@pytest.mark.parametrize("case", VARIED, ids=named)
def test_rounded(case: Conv2dCase) -> None:
    check_block_op(case, "f32", regime="rounded", dy_layouts=("batch_last", "expanded"))


@pytest.mark.parametrize(
    ("x_layout", "dy_layout"), [("contiguous", "channels_last"), ("channels_last", "gaps"), ("gaps", "batch_last")]
)
def test_layouts_of_x_and_dy(x_layout: str, dy_layout: str) -> None:
    check_block_op(BY_NAME["stride_2_odd_size"], "f32", x_layout=x_layout, dy_layouts=(dy_layout,))


def test_results_are_stored_as_their_source() -> None:
    case = BY_NAME["plain"]
    numbers = operands(case, "f32", "exact")
    for layout in ("batch_last", "channels_last"):
        got = differentiate(block_op(case), moved(numbers, layout, numbers.dy, layout))
        for image in (got.fwd, got.dx):
            assert is_batch_last(image) == (layout == "batch_last")
            assert image.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("case", [BY_NAME["ragged"], BY_NAME["groups_2_ragged_strided"]], ids=named)
def test_gradients_of_gradients(case: Conv2dCase) -> None:
    """Each gradient's gradients, which are the other two ops."""
    numbers = operands(case, "f32", "exact")
    generator = torch.Generator().manual_seed(1)
    results = []
    for op, device in ((block_op(case), DEVICE), (case.dense, "cpu")):
        dtype = torch.float32 if op is not case.dense else torch.float64
        x, values, bias, dy = (None if t is None else t.to(device, dtype).requires_grad_() for t in numbers)
        assert x is not None
        first = torch.autograd.grad(op(x, values, bias), (x, values, bias), dy, create_graph=True)
        generator.manual_seed(1)
        pulls = [torch.randint(-2, 3, t.shape, generator=generator).to(device, dtype) for t in first]
        results.append([t.cpu().double() for t in torch.autograd.grad(first, (x, values, dy), pulls)])
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() < 2**24
        assert torch.equal(got, expected)


def test_same_bits_on_every_run() -> None:
    case = BY_NAME["several_tiles"]
    numbers = operands(case, "f32", "rounded")
    there = moved(numbers, "batch_last", numbers.dy, "batch_last")
    first = differentiate(block_op(case), there)
    again = differentiate(block_op(case), there._replace(x=there.x.clone(), dy=there.dy.clone()))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_a_missing_block_meets_no_infinity() -> None:
    """Neither an infinite channel that no block reads, nor infinities that a missing tap would have reached."""
    kept = torch.zeros(16, 32, 3, 3, dtype=torch.bool)
    kept[:, :16, 1, 0] = True
    plan = Plan.from_mask(kept)
    values = torch.randn(plan.nnz).to(DEVICE).requires_grad_()
    x = to_batch_last(torch.randn(3, 32, 4, 5)).to(DEVICE)
    expected = block_conv2d(x, values, plan, padding=1)
    x[:, 16:] = float("inf")
    x[..., -1] = float("inf")  # the last column is read by taps to the right only
    assert reference.conv2d(x, values, plan, padding=1).isnan().any()
    x.requires_grad_()
    y = block_conv2d(x, values, plan, padding=1)
    assert torch.equal(y, expected)
    dy = torch.randn(y.shape).to(DEVICE)
    dy[..., 0] = float("inf")  # lies left of the image for the only tap
    y.backward(dy)
    assert x.grad is not None
    assert values.grad is not None
    assert torch.equal(x.grad[:, 16:].cpu(), torch.zeros(3, 16, 4, 5))
    assert x.grad.isfinite().all()
    assert values.grad.isfinite().all()


def test_no_images() -> None:
    case = BY_NAME["plain"]
    values = torch.ones(case.plan.nnz, device=DEVICE, requires_grad=True)
    x = torch.zeros(0, 32, 4, 5, device=DEVICE, requires_grad=True)
    y = block_conv2d(x, values, case.plan, padding=1)
    assert tuple(y.shape) == (0, 48, 4, 5)
    y.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad.cpu(), torch.zeros(case.plan.nnz))


def test_one_image_without_a_batch() -> None:
    case = BY_NAME["n_is_1"]
    x, values, bias, _ = (t.to(DEVICE) for t in operands(case, "f32", "exact"))
    y = block_conv2d(x[0], values, case.plan, bias, padding=1)
    assert torch.equal(y, block_conv2d(x, values, case.plan, bias, padding=1)[0])


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets beyond 2^31 elements. Only the pages that are touched exist."""
    if DEVICE != "cpu":
        pytest.skip("takes 4.6 GB, of which a CPU has no page until it is touched, and a GPU has all")
    apart = 2**27 + 9
    try:
        memory = torch.empty(17 * apart, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    plan = Plan.from_mask(torch.ones(16, 17, 1, 1, dtype=torch.bool))
    x = memory.as_strided((3, 17, 2, 2), (1, apart, 6, 3))
    x.copy_(torch.randint(-4, 5, x.shape))
    values = torch.randint(-4, 5, (plan.nnz,)).half()
    monkeypatch.setattr(launch, "stored", lambda t: t)  # such strides would be copied
    y = block_conv2d(x, values, plan)
    assert torch.equal(y, reference.conv2d(x.float(), values.float(), plan).half())


def test_registered_ops_are_sound() -> None:
    """Schemas, fake versions and strides, as torch checks them."""
    case = BY_NAME["stride_2_odd_size"]
    x, values, bias, dy = (t.to(DEVICE) for t in operands(case, "f32", "exact"))
    setting = (case.plan.handle, 16, "ieee", [2, 2, 1, 1, 1, 1, 1, 1])
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.fedpai
    for storage in (torch.contiguous_format, torch.channels_last):
        x, dy = x.contiguous(memory_format=storage), dy.contiguous(memory_format=storage)
        torch.library.opcheck(ops.block_conv2d_forward.default, (x, values, bias, *setting), test_utils=checks)
        torch.library.opcheck(ops.block_conv2d_input_grad.default, (dy, values, 7, 5, *setting), test_utils=checks)
        torch.library.opcheck(ops.block_conv2d_weight_grad.default, (x, dy, True, *setting), test_utils=checks)
