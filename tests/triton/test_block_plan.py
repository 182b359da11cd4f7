# SPDX-License-Identifier: Apache-2.0
"""The lists of blocks: what is in them, where their weights lie, and what no list is made of. Needs no Triton."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from fedpai_kernels import Plan
from fedpai_kernels.triton import BLOCKS, BlockPlan
from fedpai_kernels.triton.block_plan import (
    DEST_FIRST,
    DEST_SIZE,
    SOURCE_FIRST,
    SOURCE_SIZE,
    TAP,
    Walk,
    gather_map,
)  # fmt: skip
from tests.cases import BLOCK_CONV2D, BLOCK_LINEAR, Case, Conv2dCase

CASES = [*BLOCK_CONV2D, *BLOCK_LINEAR]


def geometry_of(case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and dilation."""
    if not isinstance(case, Conv2dCase):
        return (1, 1), (1, 1)
    stride, dilation = (v if isinstance(v, tuple) else (v, v) for v in (case.stride, case.dilation))
    return stride, dilation


def dense_from(walk: Walk, plan: Plan, values: Tensor, block: int, transposed: bool) -> Tensor:
    """The weight as the entries of a list tell it, every weight counted as often as it is listed."""
    entries = walk.host.entries
    places = gather_map(entries, block)
    outputs, inputs_per_group = plan.mask_shape[:2]
    weight = torch.zeros(outputs, inputs_per_group, plan.numel // (outputs * inputs_per_group), dtype=values.dtype)
    for entry, place in zip(entries.tolist(), places, strict=True):
        dest = slice(entry[DEST_FIRST], entry[DEST_FIRST] + entry[DEST_SIZE])
        source = slice(entry[SOURCE_FIRST], entry[SOURCE_FIRST] + entry[SOURCE_SIZE])
        rows, columns = (source, dest) if transposed else (dest, source)
        group = columns.start // inputs_per_group
        own = slice(columns.start - group * inputs_per_group, columns.stop - group * inputs_per_group)
        part = values[place[: entry[DEST_SIZE], : entry[SOURCE_SIZE]]]
        weight[rows, own, entry[TAP]] += part.T if transposed else part
    return weight.reshape(plan.mask_shape)


def check_rows(walk: Walk, channels: int) -> None:
    """Every channel is written by one row, and the entries of a row write its channels."""
    begin, dest, entries = (t.tolist() for t in walk.host)
    phases = walk.phases[0] * walk.phases[1]
    assert len(dest) == walk.rows
    assert len(begin) == walk.rows * phases + 1
    assert (begin[0], begin[-1]) == (0, len(entries))
    assert sorted(c for first, size in dest for c in range(first, first + size)) == list(range(channels))
    lengths = [begin[(row + 1) * phases] - begin[row * phases] for row in range(walk.rows)]
    assert lengths == sorted(lengths, reverse=True)
    for row, (first, size) in enumerate(dest):
        for entry in entries[begin[row * phases] : begin[(row + 1) * phases]]:
            assert [entry[DEST_FIRST], entry[DEST_SIZE]] == [first, size]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_lists_hold_every_weight_once(case: Case) -> None:
    plan = case.plan
    blocks = BlockPlan.of(plan)
    values = torch.arange(1, plan.nnz + 1, dtype=torch.float64)
    expected = plan.unpack(values)
    outputs, inputs = plan.mask_shape[0], plan.mask_shape[1] * plan.groups
    check_rows(blocks.forward, outputs)
    assert torch.equal(dense_from(blocks.forward, plan, values, blocks.block, False), expected)
    transposed = blocks.input_grad(*geometry_of(case))
    check_rows(transposed, inputs)
    assert torch.equal(dense_from(transposed, plan, values, blocks.block, True), expected)


@pytest.mark.parametrize("case", BLOCK_CONV2D, ids=lambda case: case.name)
def test_entries_of_a_phase_have_its_residues(case: Conv2dCase) -> None:
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry_of(case)
    walk = BlockPlan.of(case.plan).input_grad((stride_h, stride_w), (dilation_h, dilation_w))
    phases_h, phases_w = walk.phases
    assert walk.phases == ((stride_h, stride_w) if stride_h * stride_w <= 16 else (1, 1))
    begin = walk.host.begin.tolist()
    for i, (first, last) in enumerate(itertools.pairwise(begin)):
        phase = i % (phases_h * phases_w)
        for tap in walk.host.entries[first:last, TAP].tolist():
            ky, kx = divmod(tap, case.kernel[1])
            assert divmod(phase, phases_w) == (ky * dilation_h % phases_h, kx * dilation_w % phases_w)


def test_gather_map_packs() -> None:
    """values[map] are the blocks of the dense weight, and the padding of ragged ones is marked."""
    plan = Plan.from_mask(torch.ones(20, 18, 1, 2, dtype=torch.bool))
    blocks = BlockPlan.of(plan, 16)
    weight = torch.randn(20, 18, 1, 2)
    values = plan.pack(weight)
    places = blocks.gather_map()
    assert tuple(places.shape) == (8, 16, 16)  # two by two blocks, two taps
    padded = torch.zeros(32, 32, 2)
    padded[:20, :18] = weight[:, :, 0]
    expected = padded.unflatten(0, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 1, 3).flatten(0, 2)
    packed = torch.where(places < 0, torch.zeros(()), values[places.clamp(min=0)])
    assert torch.equal(packed, expected)
    assert int((places < 0).sum()) == 8 * 256 - 20 * 18 * 2


def test_the_largest_block_is_found() -> None:
    for side in BLOCKS:
        kept = torch.eye(2, dtype=torch.bool).repeat_interleave(side, 0).repeat_interleave(side, 1)
        plan = Plan.from_mask(kept)
        assert BlockPlan.of(plan).block == side
        for smaller in BLOCKS[: BLOCKS.index(side)]:
            assert BlockPlan.of(plan, smaller).count == 2 * (side // smaller) ** 2


def test_whole_says_whether_blocks_are_ragged() -> None:
    whole = BlockPlan.of(Plan.from_mask(torch.ones(32, 48, dtype=torch.bool)), 16)
    assert (whole.whole, whole.forward.whole, whole.input_grad((1, 1), (1, 1)).whole) == (True, True, True)
    outputs = BlockPlan.of(Plan.from_mask(torch.ones(33, 48, dtype=torch.bool)), 16)
    assert (outputs.whole, outputs.forward.whole, outputs.input_grad((1, 1), (1, 1)).whole) == (False, True, False)
    inputs = BlockPlan.of(Plan.from_mask(torch.ones(32, 40, dtype=torch.bool)), 16)
    assert (inputs.whole, inputs.forward.whole, inputs.input_grad((1, 1), (1, 1)).whole) == (False, False, True)


def test_a_mask_that_is_no_blocks_is_refused() -> None:
    kept = torch.ones(32, 32, 3, 3, dtype=torch.bool)
    kept[20, 17, 1, 2] = False
    plan = Plan.from_mask(kept)
    with pytest.raises(ValueError, match=r"channels 16 to 31, input channels 16 to 31, tap \(1, 2\) keeps 255 of"):
        BlockPlan.of(plan, 16)
    with pytest.raises(ValueError, match="not made of whole blocks of 16 output x 16 input channels"):
        BlockPlan.of(plan)


@pytest.mark.parametrize("block", [0, 8, 17, 256, -16])
def test_other_block_sizes_are_refused(block: int) -> None:
    plan = Plan.from_mask(torch.ones(32, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"block: expected 16, 32, 64 or 128, got {block}"):
        BlockPlan.of(plan, block)
    with pytest.raises(TypeError, match=r"plan: expected a fedpai_kernels\.Plan, got Tensor"):
        BlockPlan.of(torch.ones(2), 16)  # type: ignore[arg-type]


def test_plans_of_one_mask_share_their_lists_and_take_them_along() -> None:
    mask = torch.ones(16, 32, dtype=torch.bool)
    first, second = Plan.from_mask(mask), Plan.from_mask(mask.clone())
    blocks = BlockPlan.of(first)
    assert BlockPlan.of(second) is blocks
    assert BlockPlan.of(second, 16) is not blocks  # the largest is 32
    assert blocks.input_grad((2, 2), (1, 1)) is blocks.input_grad((2, 2), (1, 1))
    left = weakref.ref(blocks)
    del first, second, blocks
    gc.collect()
    assert left() is None


def test_lists_are_not_copied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = BlockPlan.of(Plan.from_mask(torch.ones(16, 16, dtype=torch.bool))).forward
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the layer once, forward and backward, before the capture"):
        walk.on(torch.device("cuda", 0))
    assert walk.on(torch.device("cpu")) is walk.host
