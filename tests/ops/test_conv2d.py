# SPDX-License-Identifier: Apache-2.0
"""sparse_conv2d against the reference: every case, dtype and instruction set; layouts, threads, random geometries."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpai_kernels import _C, Plan, to_batch_last
from fedpai_kernels.ops import reference, sparse_conv2d
from tests.cases import CONV2D, Conv2dCase, batch_sweep, conv2d_named
from tests.checking import LAYOUTS, check_op, differentiate, operands, runs

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# Those whose geometry, mask or batch takes another way through the schedules.
VARIED = [
    conv2d_named(name)
    for name in (
        "plain", "n_is_1", "n_not_multiple", "n_multiple", "one_by_one_on_2x2", "non_square_everything",
        "channel_blocks", "stride_2_odd_size", "dilation_with_stride", "depthwise", "heavy_row", "empty_column",
        "blocks_3x5", "blocks_wide_image", "blocks_channel_blocks", "blocks_lost",
    )
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ every case


@runs(CONV2D)
def test_exact(case: Conv2dCase, dtype: str, isa: str, walk: str) -> None:
    check_op(case, dtype, isa, regime="exact", dy_layouts=("contiguous", "channels_last", "gaps"))


@runs(CONV2D)
def test_rounded(case: Conv2dCase, dtype: str, isa: str, walk: str) -> None:
    check_op(case, dtype, isa, regime="rounded")


@runs(CONV2D)
def test_each_gradient_alone(case: Conv2dCase, dtype: str, isa: str, walk: str) -> None:
    """Another walk may compute both at once; in numbers that are not rounded nobody sees a difference."""
    numbers = operands(case, dtype, "exact")
    x, values = numbers.x.clone().requires_grad_(), numbers.values.clone().requires_grad_()
    both = torch.autograd.grad(case.sparse(x, values, numbers.bias), (x, values), numbers.dy)
    [dx] = torch.autograd.grad(case.sparse(x, values.detach(), numbers.bias), (x,), numbers.dy)
    [dvalues] = torch.autograd.grad(case.sparse(x.detach(), values, numbers.bias), (values,), numbers.dy)
    assert torch.equal(dx, both[0])
    assert torch.equal(dvalues, both[1])


@runs(VARIED)
def test_every_layout_of_x_and_dy(case: Conv2dCase, dtype: str, isa: str) -> None:
    check_op(case, dtype, isa, x_layouts=tuple(LAYOUTS), dy_layouts=tuple(LAYOUTS))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_every_batch_from_1_to_65(isa: str, dtype: str, walk: str) -> None:
    for batch in range(1, 66):
        for case in batch_sweep(batch):
            check_op(case, dtype, isa, expanded=False)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", VARIED, ids=lambda case: case.name)
def test_any_number_of_threads(
    case: Conv2dCase, threads: int, isa: str, walk: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    check_op(case, "f32", isa, regime="exact")
    check_op(case, "f32", isa, regime="rounded", dy_layouts=("contiguous",))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", VARIED, ids=lambda case: case.name)
def test_same_bits_on_every_run(
    case: Conv2dCase, threads: int, isa: str, walk: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    numbers = operands(case, "f32", "rounded")
    first = differentiate(case.sparse, numbers)
    for _ in range(3):
        # Other memory, so that nothing can be left over from the run before.
        again = differentiate(case.sparse, numbers._replace(x=numbers.x.clone(), dy=numbers.dy.clone()))
        for one, other in zip(first, again, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_forward_and_dx_do_not_depend_on_the_number_of_threads(
    isa: str, walk: str, set_threads: Callable[[int], None]
) -> None:
    for case in VARIED:
        numbers = operands(case, "f32", "rounded")
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(differentiate(case.sparse, numbers))
        for other in results[1:]:
            assert torch.equal(results[0].fwd, other.fwd), case.name
            assert torch.equal(results[0].dx, other.dx), case.name


def test_unknown_walk_is_refused() -> None:
    before = _C.walk()
    with pytest.raises(ValueError, match="walk: expected choose, tiled or streamed, got sideways"):
        _C.force_walk("sideways")
    assert _C.walk() == before


# -------------------------------------------------------------------------------------------- random geometries


@st.composite
def _geometries(draw: st.DrawFn) -> Conv2dCase:
    """Any convolution with a non-empty output, small enough for exact float32 sums."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 5)), draw(st.integers(0, 5)))
    smallest = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    return Conv2dCase(
        "random",
        batch=draw(st.integers(1, 40)),
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        image=(draw(st.integers(smallest[0], smallest[0] + 11)), draw(st.integers(smallest[1], smallest[1] + 11))),
        kernel=kernel,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        density=draw(st.sampled_from([0.02, 0.1, 0.3, 0.7, 1.0])),
        bias=draw(st.booleans()),
    )


# The instruction set stays as the fixture left it, for all examples.
_PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=150)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_random_geometries(isa: str, dtype: str, walk: str) -> None:
    @_PROPERTY
    @given(_geometries(), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS)))
    def check(case: Conv2dCase, x_layout: str, dy_layout: str) -> None:
        check_op(case, dtype, isa, x_layouts=(x_layout,), dy_layouts=(dy_layout,), expanded=False)

    check()


# ----------------------------------------------------------------------------------- numbers that are not finite


def test_nan_outside_mask_stays_out(isa: str) -> None:
    case = conv2d_named("plain")
    x, _, bias, dy = operands(case, "f32", "rounded")
    weight = torch.randn(case.mask_shape)
    weight[~case.plan.mask()] = float("nan")
    values = case.plan.pack(weight).requires_grad_()
    x.requires_grad_()
    y = case.sparse(x, values, bias)
    y.backward(dy)
    for result in (y, x.grad, values.grad):
        assert result is not None
        assert result.isfinite().all()


def test_zero_times_inf(isa: str) -> None:
    """A channel that no weight reads may be infinite: dense-masked torch gives NaN, a missing connection nothing."""
    mask = torch.rand(5, 4, 3, 3) < 0.4
    mask[:, 2] = False
    plan = Plan.from_mask(mask)
    values, x = torch.randn(plan.nnz), torch.randn(9, 4, 6, 6)
    expected = sparse_conv2d(x, values, plan, padding=1)
    x[:, 2] = float("inf")
    assert reference.conv2d(x, values, plan, padding=1).isnan().any()
    x.requires_grad_()
    y = sparse_conv2d(x, values, plan, padding=1)
    assert torch.equal(y, expected)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad[:, 2], torch.zeros(9, 6, 6))


@pytest.mark.parametrize("name", ["plain", "n_not_multiple", "stride_2_odd_size", "one_by_one"])
def test_nan_of_one_image_stays_in_it(name: str, isa: str) -> None:
    case = conv2d_named(name)
    numbers = operands(case, "f32", "exact")
    expected = differentiate(case.dense, numbers)
    x, dy = numbers.x.clone(), numbers.dy.clone()
    x[-1] = dy[-1] = float("nan")
    got = differentiate(case.sparse, numbers._replace(x=to_batch_last(x), dy=to_batch_last(dy)))
    assert got.fwd[-1].isnan().any()
    assert torch.equal(got.fwd[:-1], expected.fwd[:-1])
    assert torch.equal(got.dx[:-1], expected.dx[:-1])


# -------------------------------------------------------------------------------------------------------- sizes


def test_offsets_beyond_32_bits() -> None:
    """Planes more than 2^31 elements apart. Only the pages that are touched exist."""
    apart = 2**31 + 7
    try:
        memory = torch.empty(apart + 1000)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    x = memory.as_strided((3, 2, 5, 4), (1, apart, 12, 3))
    x.copy_(torch.randint(-4, 5, x.shape))
    case = Conv2dCase("apart", batch=3, in_channels=2, out_channels=3, image=(5, 4), density=0.6)
    numbers = operands(case, "f32", "exact")._replace(x=x)
    got, expected = differentiate(case.sparse, numbers), differentiate(case.dense, numbers)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("resnet_first", 0.1, batch=64, in_channels=64, out_channels=64, image=(32, 32), bias=False),
        Conv2dCase("resnet_strided", 0.02, batch=33, in_channels=64, out_channels=128, image=(32, 32), stride=2),
        Conv2dCase("resnet_last", 0.02, batch=65, in_channels=512, out_channels=512, image=(4, 4), bias=False),
        Conv2dCase("vgg_last", 0.02, batch=64, in_channels=512, out_channels=512, image=(2, 2)),
        Conv2dCase(
            "shortcut", 0.05, batch=64, in_channels=256, out_channels=512, image=(8, 8), kernel=(1, 1),
            padding=0, stride=2,
        ),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_layers_of_real_networks(case: Conv2dCase, isa: str, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    check_op(case, "f32", isa, regime="exact", expanded=False)
    check_op(case, "f32", isa, regime="rounded", expanded=False)


# ------------------------------------------------------------------------------------------------------ threads


def test_many_python_threads_share_one_plan(set_threads: Callable[[int], None]) -> None:
    """As clients of one process do: other batch sizes at the same time, one schedule cache."""
    set_threads(1)
    batches = [1, 5, 16, 17, 33, 40, 64, 65]
    cases = {batch: Conv2dCase("shared", batch=batch, in_channels=7, out_channels=9, image=(6, 5)) for batch in batches}
    plan = Plan.from_mask(torch.rand(9, 7, 3, 3) < 0.3)
    values = torch.randn(plan.nnz)
    work = {batch: operands(case, "f32", "rounded") for batch, case in cases.items()}

    def step(batch: int) -> list[Tensor]:
        x, _, bias, dy = work[batch]
        x, v = x.detach().requires_grad_(), values.clone().requires_grad_()
        y = sparse_conv2d(x, v, plan, bias, padding=1)
        y.backward(dy)
        assert x.grad is not None
        assert v.grad is not None
        return [y.detach(), x.grad, v.grad]

    alone = {batch: step(batch) for batch in batches}
    wrong: list[str] = []
    start = threading.Barrier(len(batches))

    def client(first: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        for i in range(20):
            batch = batches[(first + i) % len(batches)]
            if not all(torch.equal(a, b) for a, b in zip(step(batch), alone[batch], strict=True)):
                wrong.append(f"batch {batch}")

    clients = [threading.Thread(target=client, args=(i,)) for i in range(len(batches))]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert wrong == []
