# SPDX-License-Identifier: Apache-2.0
"""Channels that keep the same weights are walked together, in panels: which are, and what that may change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fedpai_kernels import Plan, to_batch_last
from fedpai_kernels.ops import sparse_conv2d, sparse_linear
from tests.cases import CONV2D, LINEAR, Case, Conv2dCase, LinearCase
from tests.checking import LAYOUTS, check_op, differentiate, operands

NAMED = {(case.op, case.name): case for case in [*CONV2D, *LINEAR]}

TILED = pytest.mark.parametrize("walk", ["tiled"], indirect=True)  # the walk that knows panels


# ------------------------------------------------------------------------------------------------ which are


@pytest.mark.parametrize(
    "case",
    [case for case in [*CONV2D, *LINEAR] if case.name.startswith(("blocks", "nearly_dense", "whole", "full"))],
    ids=lambda case: f"{case.op}-{case.name}",
)
def test_structures_are_walked_together(case: Case) -> None:
    outputs, inputs = case.plan.compiled.shared_weights
    assert case.plan.shared == (2 * outputs + inputs) / (3 * case.plan.nnz)
    # Blocks of one output channel share input channels only, which is a third of the work.
    assert case.plan.shared > 0.3
    assert (case.plan.shared > 0.5) == (outputs > 0.8 * case.plan.nnz)


@pytest.mark.parametrize(
    ("op", "name"),
    [("conv2d", name) for name in ("plain", "channels_prime", "channel_blocks", "groups_2", "depthwise", "fan_in")]
    + [("linear", name) for name in ("n_multiple", "empty_column", "diagonal")],
)
def test_scattered_weights_are_not(op: str, name: str) -> None:
    assert NAMED[op, name].plan.compiled.shared_weights == (0, 0)
    assert NAMED[op, name].plan.shared == 0


def shared(*rows: str) -> tuple[int, int]:
    """Of a linear mask, drawn."""
    mask = torch.tensor([[mark == "x" for mark in row] for row in rows])
    return Plan.from_mask(mask).compiled.shared_weights


def test_nearly_equal_neighbours_share_from_a_fill_of_065() -> None:
    # 8 of 4 x 3 places, and one less.
    assert shared("xxx", "xx.", "x.x", "x..")[0] == 8
    assert shared("xxx", "xx.", "x..", "..x")[0] == 0
    # Only rows that are like no other are put together with neighbours: here the last two, 3 of 6 places.
    assert shared("x..", "x..", "xxx", "..x")[0] == 2 + 4
    assert shared("x..", "x..", "xx.", "..x")[0] == 2


# --------------------------------------------------------------------------------------------- random blocks


@st.composite
def _cases(draw: st.DrawFn) -> Conv2dCase | LinearCase:
    """Any block, whole or damaged, in any layer that is small enough for exact float32 sums."""
    mask = f"{draw(st.integers(1, 9))}x{draw(st.integers(1, 9))}"
    mask += draw(st.sampled_from(["", "-taps"])) + draw(st.sampled_from(["", " lost", " shuffled", " empty_borders"]))
    batch, density = draw(st.integers(1, 40)), draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))
    if draw(st.booleans()):
        features = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        return LinearCase("random", density, mask, leading=(batch,), in_features=features[0], out_features=features[1])
    groups, kernel = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 3))
    return Conv2dCase(
        "random", density, mask, draw(st.booleans()), batch,
        in_channels=groups * draw(st.integers(1, 12)),
        out_channels=groups * draw(st.integers(1, 12)),
        image=(draw(st.integers(3, 7)), draw(st.integers(3, 7))),
        kernel=(kernel, draw(st.integers(1, 3))),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        groups=groups,
    )  # fmt: skip


@TILED
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_random_blocks(isa: str, dtype: str, walk: str, set_threads: Callable[[int], None]) -> None:
    @settings(deadline=None, derandomize=True, database=None, max_examples=150)
    @given(_cases(), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 2))
    def check(case: Case, x_layout: str, dy_layout: str, threads: int) -> None:
        set_threads(threads)
        check_op(case, dtype, isa, x_layouts=(x_layout,), dy_layouts=(dy_layout,), expanded=False)

    check()


# ------------------------------------------------------------------------------------------------- gradients

SMALL = [
    Conv2dCase("blocks", 0.5, "3x2", batch=2, in_channels=2, out_channels=6, image=(2, 3), kernel=(2, 3)),
    Conv2dCase("blocks_lost", 1.0, "4x4 lost", batch=2, in_channels=3, out_channels=4, image=(3, 2), stride=2),
    Conv2dCase("blocks_groups", 0.6, "2x2-taps", batch=2, in_channels=4, out_channels=4, image=(2, 2), groups=2),
    LinearCase("blocks", 0.5, "4x2", leading=(3,), in_features=6, out_features=7),
    LinearCase("blocks_lost", 1.0, "4x4 lost", leading=(3,), in_features=4, out_features=5),
]  # fmt: skip


@TILED
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case.name}")
def test_gradcheck_and_gradgradcheck(case: Case, isa: str, walk: str) -> None:
    assert case.plan.shared > 0.6
    numbers = operands(case, "f64", "rounded")
    inputs = tuple(t.requires_grad_() for t in numbers[:3] if t is not None)
    assert gradcheck(case.sparse, inputs)
    assert gradgradcheck(case.sparse, inputs, (numbers.dy.requires_grad_(),))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "values"])
def test_gradients_only_where_wanted(wanted: tuple[bool, bool], isa: str) -> None:
    case = NAMED["conv2d", "blocks_lost"]
    numbers = operands(case, "f32", "exact")
    expected = differentiate(case.dense, numbers)
    x, values = (t.detach().requires_grad_(w) for t, w in zip(numbers[:2], wanted, strict=True))
    case.sparse(x, values, numbers.bias).backward(numbers.dy)
    for leaf, gradient, is_wanted in zip((x, values), (expected.dx, expected.dw), wanted, strict=True):
        assert (leaf.grad is not None) == is_wanted
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@TILED
def test_threads_that_share_the_sums_keep_to_their_own(walk: str, set_threads: Callable[[int], None]) -> None:
    """Panels of three, one of each thread: nothing is added, not even zero, where the neighbour's sums begin."""
    case = Conv2dCase("large", 0.95, "3x1", bias=False, batch=16, in_channels=4096, out_channels=6, image=(8, 8))
    numbers = operands(case, "f64", "exact")
    x, dy = to_batch_last(numbers.x), to_batch_last(numbers.dy)
    values = numbers.values.requires_grad_()
    y = case.sparse(x, values, None)
    set_threads(1)
    (expected,) = torch.autograd.grad(y, values, dy, retain_graph=True)
    set_threads(2)
    for _ in range(80):
        (found,) = torch.autograd.grad(y, values, dy, retain_graph=True)
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------- numbers that are not finite


NOT_FINITE = [float("-inf"), float("nan")]


def reached(plan: Plan, bad: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is not finite when in image 6 of 9 one channel is: of y (input, image, output), of dx (output, image,
    input), of dvalues (input, weight)."""
    of_conv, values = plan.kind == "conv2d", torch.rand(plan.nnz) + 1
    outputs, inputs = plan.mask_shape[0], plan.mask_shape[1] * plan.groups

    def differentiated(input_: int | None, output: int | None) -> list[Tensor]:
        x = torch.randn(9, inputs, *(5, 4) * of_conv)
        dy = torch.randn(9, outputs, *(5, 4) * of_conv)
        if input_ is not None:
            x[6, input_] = bad
        if output is not None:
            dy[6, output] = bad
        x, v = to_batch_last(x).requires_grad_(), values.clone().requires_grad_()
        y = sparse_conv2d(x, v, plan, padding=1, groups=plan.groups) if of_conv else sparse_linear(x, v, plan)
        # Batch-last as well: a matrix of rows is never streamed.
        found = [y, *torch.autograd.grad(y, (x, v), to_batch_last(dy))]
        return [~t.isfinite().reshape(*t.shape[:2], -1).all(2) if t.dim() > 1 else ~t.isfinite() for t in found]

    by_input = [differentiated(i, None) for i in range(inputs)]
    dx = [differentiated(None, o)[1] for o in range(outputs)]
    return torch.stack([y for y, _, _ in by_input]), torch.stack(dx), torch.stack([dv for *_, dv in by_input])


def read_by(plan: Plan) -> tuple[Tensor, Tensor]:
    """Which inputs each output reads, (output, input), and each weight, (input, weight)."""
    kernels = plan.mask().flatten(2).any(2) if plan.kind == "conv2d" else plan.mask()
    blocks = list(kernels.chunk(plan.groups))
    outputs = torch.block_diag(*(block.int() for block in blocks)).bool()
    output, column = (i.flatten() for i in torch.unravel_index(plan.indices, plan.mask_shape)[:2])
    of_weight = column + output // (plan.mask_shape[0] // plan.groups) * plan.mask_shape[1]
    return outputs, of_weight == torch.arange(outputs.shape[1])[:, None]


EXACT_PANELS = [
    *(("conv2d", name) for name in ("blocks_16x1", "blocks_1x16", "blocks_3x5", "blocks_4x4", "blocks_shuffled")),
    *(("conv2d", name) for name in ("blocks_groups_2", "blocks_empty_borders", "whole_channels", "two_of_four")),
    *(("conv2d", name) for name in ("plain", "groups_2", "fan_in", "empty_column")),
    *(("linear", name) for name in ("blocks_16x1", "blocks_3x5", "blocks_shuffled", "whole_channels", "n_multiple")),
]


@pytest.mark.parametrize(("op", "name"), EXACT_PANELS)
def test_what_no_weight_reads_may_be_anything(op: str, name: str, isa: str, walk: str) -> None:
    """Rows that are exactly alike, or alone: a missing connection carries nothing, not even an infinity."""
    plan = NAMED[op, name].plan
    outputs, weights = read_by(plan)
    for bad in NOT_FINITE:
        y, dx, dvalues = reached(plan, bad)
        assert torch.equal(y[:, 6], outputs.t())
        assert torch.equal(dx[:, 6], outputs)
        assert not y[:, [*range(6), 7, 8]].any()
        assert not dx[:, [*range(6), 7, 8]].any()
        assert torch.equal(dvalues, weights)


def nearly_full(*shape: int) -> Plan:
    """No two rows or columns alike, all nearly full; some outputs do not read an input at all."""
    mask = torch.rand(shape) >= (0.08 if len(shape) == 4 else 0)
    for i in range(shape[0]):
        mask[i, (i * 3 + 1) % shape[1]] = False
    return Plan.from_mask(mask)


def of_panels(reads: Tensor) -> Tensor:
    """What each row reads or a row of its panel does: four neighbours, from the first on."""
    return torch.cat([rows.any(0).expand_as(rows) for rows in reads.split(4)])


@pytest.mark.parametrize("shape", [(10, 7, 3, 3), (10, 10)], ids=str)
def test_nearly_equal_rows_share_what_is_not_finite(shape: tuple[int, ...], isa: str, walk: str) -> None:
    """The values that they lack are zeros in their panel, which meet what the others read: 0 * inf is NaN there.

    Never in another image or panel, never in the gradient of values, and only where the layer is tiled.
    """
    plan = nearly_full(*shape)
    assert plan.shared == 1
    outputs, weights = read_by(plan)
    in_panels = of_panels(outputs), of_panels(outputs.t())
    assert not torch.equal(in_panels[0], outputs)
    for bad in NOT_FINITE:
        y, dx, dvalues = reached(plan, bad)
        for found, alone, together in ((y, outputs, in_panels[0]), (dx, outputs.t(), in_panels[1])):
            assert not found[:, [*range(6), 7, 8]].any()
            hit = found[:, 6].t()
            assert torch.equal(hit, alone) or (walk == "tiled" and torch.equal(hit, together))
        assert torch.equal(dvalues, weights)
