# SPDX-License-Identifier: Apache-2.0
"""Plans of masks with structure: declared and checked, found by themselves, shared and pickled."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from fedpai_kernels import Plan
from fedpai_kernels.structure import Block, Channel, NOfM, Structure
from tests.cases import CONV2D, LINEAR, Case
from tests.masks import make_mask

NAMED = {(case.op, case.name): case for case in [*CONV2D, *LINEAR]}
DECLARED = {
    ("conv2d", "blocks_16x1"): "16x1",
    ("conv2d", "blocks_3x5"): "3x5",
    ("conv2d", "blocks_8x8_taps"): "8x8-taps",
    ("conv2d", "blocks_groups_2"): "4x3",
    ("conv2d", "blocks_depthwise_multiplier_4"): "4x1",
    ("conv2d", "whole_channels"): "channel",
    ("conv2d", "two_of_four"): "2:4",
    ("conv2d", "fan_in"): "fan-in",
    ("conv2d", "plain"): "weight",
    ("linear", "blocks_8x8_n_not_multiple"): "8x8",
    ("linear", "whole_channels"): "channel",
    ("linear", "two_of_four"): "2:4",
}


def declared(case: Case, structure: str | Structure) -> Plan:
    return Plan.from_mask(make_mask(case), groups=case.groups, structure=structure)


@pytest.mark.parametrize(("op", "name"), DECLARED)
def test_what_a_mask_is_declared_to_be_changes_nothing(op: str, name: str) -> None:
    case = NAMED[op, name]
    plan = declared(case, DECLARED[op, name])
    assert plan == case.plan
    assert plan.compiled is case.plan.compiled
    assert plan.structure == case.plan.structure
    assert plan.shared == case.plan.shared


@pytest.mark.parametrize(("op", "name"), [key for key, structure in DECLARED.items() if structure != "weight"])
def test_one_weight_more_or_less_is_refused(op: str, name: str) -> None:
    case = NAMED[op, name]
    mask = make_mask(case)
    places = mask.nonzero() if DECLARED[op, name] in ("channel", "fan-in") else (~mask).nonzero()
    mask[tuple(places[0])] ^= True
    with pytest.raises(ValueError, match=f"^structure: the mask is not {DECLARED[op, name]}: .*keeps"):
        Plan.from_mask(mask, groups=case.groups, structure=DECLARED[op, name])


def broken(*shape: int, at: tuple[tuple[int, ...], ...]) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for place in at:
        mask[place] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "groups", "structure", "message"),
    [
        (
            broken(32, 6, 3, 3, at=((20, 4, 0, 0), (17, 2, 1, 2), (3, 5, 2, 2))), 1, "16x1",
            "the mask is not 16x1: the block of output channels 0 to 15, input channel 5, tap (2, 2) keeps 15 of its "
            "16 weights",
        ),
        (
            broken(16, 16, at=((9, 12), (15, 3))), 1, Block(8, 8),
            "the mask is not 8x8: the block of output channels 8 to 15, input channels 0 to 7 keeps 63 of its 64 "
            "weights",
        ),
        (
            broken(12, 6, 3, 3, at=((10, 1, 1, 1),)), 2, "4x2-taps",
            "the mask is not 4x2-taps: the block of output channels 10 to 11, input channels 0 to 1 of group 1 keeps "
            "35 of its 36 weights",
        ),
        (
            broken(4, 8, at=((1, 2),)), 1, Channel(),
            "the mask is not channel: it keeps weights of output channel 1 and of input channel 2, but not the one "
            "between them",
        ),
        (
            broken(4, 8, at=((0, 0), (0, 1))), 1, NOfM(2, 4),
            "the mask is not 2:4: output channel 0, input channels 4 to 7 keeps 4 of its 4 weights, expected at most 2",
        ),
        (
            broken(4, 8, at=((2, 2),)), 1, "fan-in",
            "the mask is not fan-in: output channel 2 keeps 7 weights, output channel 0 keeps 8",
        ),
        (
            broken(4, 8, at=()), 1, "8x8",
            "a block of 8x8 is larger than the layer's 4 output and 8 input channels",
        ),
    ],
)  # fmt: skip
def test_the_first_offending_block_is_named(
    mask: Tensor, groups: int, structure: str | Structure, message: str
) -> None:
    with pytest.raises(ValueError, match=r"^structure: ") as error:
        Plan.from_mask(mask, groups=groups, structure=structure)
    assert str(error.value) == f"structure: {message}"
    assert Plan.from_mask(mask, groups=groups).nnz == int(mask.sum())


@pytest.mark.parametrize("name", ["", "16", "16x", "0x4", "4:2", "block", "Auto"])
def test_unknown_structures_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^structure: got '{name}', expected 'weight', a block such as '16x1'"):
        Plan.from_mask(torch.ones(16, 16, dtype=torch.bool), structure=name)


@pytest.mark.parametrize(("op", "name"), DECLARED)
def test_pickles_and_equal_masks_share(op: str, name: str) -> None:
    plan = NAMED[op, name].plan
    again = pickle.loads(pickle.dumps(plan))
    assert again.compiled is plan.compiled
    assert again.structure is plan.structure
    assert again.shared == plan.shared
    other = make_mask(NAMED[op, name])
    other.view(-1)[0] ^= True
    assert Plan.from_mask(other, groups=plan.groups).compiled is not plan.compiled


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (torch.ones(8, 8, dtype=torch.bool), 1),
        (torch.eye(8, dtype=torch.bool), 0),
        (torch.eye(4, dtype=torch.bool).repeat_interleave(4, 0), 2 / 3),
        (torch.eye(4, dtype=torch.bool).repeat_interleave(4, 1), 1 / 3),
        (torch.eye(3, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(5, 1), 1),
        (torch.eye(4, dtype=torch.bool).repeat(4, 1), 2 / 3),  # rows that are no neighbours
        (torch.ones(1, 8, dtype=torch.bool), 1 / 3),
    ],
)
def test_shares(mask: Tensor, share: float) -> None:
    assert Plan.from_mask(mask).shared == pytest.approx(share)
