# SPDX-License-Identifier: Apache-2.0
"""Structures of masks: their names, what has them, and what a mask that has not is told."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai_kernels.structure import (
    Block,
    Channel,
    FanIn,
    NOfM,
    Structure,
    Unstructured,
    check,
    describe,
    parse,
)

NAMES = {
    "weight": Unstructured(),
    "16x1": Block(16, 1),
    "1x16": Block(1, 16),
    "8x8-taps": Block(8, 8, taps=True),
    "1x1-taps": Block(1, 1, taps=True),
    "channel": Channel(),
    "2:4": NOfM(2, 4),
    "fan-in": FanIn(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_back(name: str) -> None:
    assert parse(name) == NAMES[name]
    assert str(NAMES[name]) == name


def test_one_by_one_is_a_weight() -> None:
    assert parse("1x1") == Unstructured()


@pytest.mark.parametrize(
    "name", ["", "0x4", "4x0", "4", "04x4", "4x4x4", "-1x4", "4:2", "4:4", "0:4", "16X1"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"structure: got '{name}', expected 'weight', a block such as '16x1'"
    ):
        parse(name)


@pytest.mark.parametrize(
    "make", [lambda: Block(0, 4), lambda: Block(4, -1), lambda: Block(1, 1), lambda: NOfM(4, 4)]
)
def test_structures_that_cannot_be(make) -> None:
    with pytest.raises(ValueError, match=r"structure: (got|a block of 1x1)"):
        make()


def blocks_slowly(shape: tuple[int, ...], block: Block, groups: int) -> torch.Tensor:
    """The number of every weight's block, by loops."""
    out, columns, kernel_h, kernel_w = (*shape, 1, 1)[:4]
    numbers: dict[tuple[int, ...], int] = {}
    result = torch.empty(out, columns, kernel_h, kernel_w, dtype=torch.int64)
    for o in range(out):
        group, row = divmod(o, out // groups)
        for i in range(columns):
            for tap in range(kernel_h * kernel_w):
                key = (group, row // block.rows, i // block.columns, 0 if block.taps else tap)
                result[o, i, tap // kernel_w, tap % kernel_w] = numbers.setdefault(key, len(numbers))
    return result.reshape(shape)


@st.composite
def blocked(draw: st.DrawFn) -> tuple[tuple[int, ...], Block, int, torch.Tensor]:
    """A shape, a block that fits it, the groups, and a random mask of such blocks."""
    groups, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape: tuple[int, ...] = (groups * rows, columns, draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    if groups == 1 and draw(st.booleans()):
        shape = shape[:2]
    sides = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    block = Block(*sides, taps=True if sides == (1, 1) else draw(st.booleans()))
    numbers = blocks_slowly(shape, block, groups)
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=(n := int(numbers.max()) + 1), max_size=n)))
    return shape, block, groups, kept[numbers]


@given(blocked())
@settings(max_examples=150, deadline=None)
def test_masks_of_whole_blocks_pass(case: tuple[tuple[int, ...], Block, int, torch.Tensor]) -> None:
    _, block, groups, mask = case
    check(mask, block, groups)


@given(blocked(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_split_block_is_found_and_counted(
    case: tuple[tuple[int, ...], Block, int, torch.Tensor], data: st.DataObject
) -> None:
    shape, block, groups, mask = case
    at = data.draw(st.integers(0, mask.numel() - 1))
    mask.view(-1)[at] ^= True
    numbers = blocks_slowly(shape, block, groups)
    whole = numbers == numbers.view(-1)[at]
    if whole.sum() == 1:
        check(mask, block, groups)
        return
    with pytest.raises(
        ValueError, match=rf"not {block}: .* keeps {mask[whole].sum()} of its {whole.sum()} weights"
    ):
        check(mask, block, groups)


def test_the_first_split_block_is_named() -> None:
    mask = torch.zeros(40, 5, 3, 3, dtype=torch.bool)
    mask[16:21, 3, 0, 2] = True
    mask[32, 0, 0, 0] = True
    with pytest.raises(ValueError, match="structure: ") as error:
        check(mask, Block(16, 1))
    assert str(error.value) == (
        "structure: the mask is not 16x1: the block of output channels 16 to 31, input channel 3, tap (0, 2) "
        "keeps 5 of its 16 weights"
    )
    # A later weight of an earlier block comes first.
    mask[15, 4, 2, 2] = True
    with pytest.raises(
        ValueError, match=r"output channels 0 to 15, input channel 4, tap \(2, 2\) keeps 1 of its 16"
    ):
        check(mask, Block(16, 1))


def test_ragged_edges_groups_taps_and_linear_layers_are_named() -> None:
    mask = torch.zeros(10, 5, 3, 3, dtype=torch.bool)
    mask[9, 4] = True
    check(mask, Block(1, 2, taps=True))
    with pytest.raises(
        ValueError, match=r"output channels 8 to 9, input channel 4 keeps 9 of its 18 weights$"
    ):
        check(mask, Block(4, 2, taps=True))
    with pytest.raises(
        ValueError, match=r"output channels 8 to 9, input channel 4 of group 1 keeps 9 of its 18"
    ):
        check(mask, Block(3, 4, taps=True), groups=2)
    with pytest.raises(
        ValueError, match=r"output channels 2 to 3, input channel 1 keeps 1 of its 2 weights$"
    ):
        check(torch.tensor([[0, 0], [0, 0], [0, 1], [0, 0]]) == 1, Block(2, 1))


@pytest.mark.parametrize(
    ("structure", "groups", "message"),
    [
        (Block(64, 64), 1, "a block of 64x64 is larger than the layer's 32 output and 16 input channels$"),
        (
            Block(16, 1),
            4,
            "a block of 16x1 is larger than the layer's 8 output and 16 input channels per group$",
        ),
        (NOfM(2, 32), 1, "2:32 is wider than the layer's 16 input channels$"),
    ],
)
def test_larger_than_the_layer(structure: Structure, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"structure: {message}"):
        check(torch.ones(32, 16, 3, 3, dtype=torch.bool), structure, groups)


def test_channels() -> None:
    outputs, inputs = torch.tensor([1, 0, 1, 1]) == 1, torch.tensor([0, 1, 1]) == 1
    mask = (outputs[:, None] & inputs)[..., None, None].expand(4, 3, 3, 3).clone()
    check(mask, Channel())
    mask[2, 1, 0, 1] = False
    with pytest.raises(
        ValueError,
        match=r"not channel: it keeps weights of output channel 2 and of input channel 1, "
        r"but not the one between them at tap \(0, 1\)$",
    ):
        check(mask, Channel())
    # Each group has inputs of its own.
    mask = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]) == 1
    check(mask[..., None, None], Channel(), groups=2)
    with pytest.raises(
        ValueError, match=r"output channel 0 and of input channel 1, but not the one between them$"
    ):
        check(mask, Channel())


def test_n_of_m() -> None:
    mask = torch.zeros(4, 10, 1, 2, dtype=torch.bool)
    mask[:, [0, 3, 5, 6, 8, 9]] = True
    check(mask, NOfM(2, 4))
    mask[2:, 6, 0, 1] = False
    check(mask, NOfM(2, 4))
    mask[3, 4, 0, 0] = True
    with pytest.raises(
        ValueError,
        match=r"not 2:4: output channel 3, input channels 4 to 7 of group 1, tap \(0, 0\) keeps 3 of its 4 weights, "
        "expected at most 2$",
    ):
        check(mask, NOfM(2, 4), groups=2)
    with pytest.raises(ValueError, match=r"input channels 8 to 9, tap \(0, 0\) keeps 2 .* at most 1$"):
        check(mask[:1, :, :, :1] & (torch.arange(10) % 4 < 2)[:, None, None], NOfM(1, 4))


def test_fan_in() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]) == 1
    check(mask, FanIn())
    mask[1, 0] = True
    with pytest.raises(ValueError, match=r"output channel 1 keeps 3 weights, output channel 0 keeps 2$"):
        check(mask, FanIn())


def block_mask(shape: tuple[int, ...], block: Block, groups: int = 1) -> torch.Tensor:
    numbers = blocks_slowly(shape, block, groups)
    return (torch.rand(int(numbers.max()) + 1) < 0.5)[numbers]


def n_of_m_mask(n: int, m: int, shape: tuple[int, ...]) -> torch.Tensor:
    scores = torch.rand(shape[0], shape[1] // m, m, *shape[2:])
    return (scores.argsort(2).argsort(2) < n).reshape(shape)


@functools.cache
def described() -> dict[str, tuple[torch.Tensor, int, str]]:
    torch.manual_seed(0)
    ones = torch.ones(32, 16, 3, 3, dtype=torch.bool)
    channels = ones.clone()
    channels[[0, 3, 4, 9, 31]] = False
    channels[:, [1, 2, 15]] = False
    fan_in = torch.rand(32, 144).argsort(1).reshape(32, 16, 3, 3) < 20
    return {
        "dense": (ones, 1, "dense"),
        "empty": (~ones, 1, "empty"),
        "channels": (channels, 1, "channel"),
        "channels of groups": (channels, 4, "channel"),
        "depthwise": (torch.rand(32, 1, 1, 1).expand(32, 1, 3, 3) < 0.5, 32, "channel"),
        "16x1": (block_mask((32, 16, 3, 3), Block(16, 1)), 1, "16x1"),
        "1x16": (block_mask((32, 64), Block(1, 16)), 1, "1x16"),
        "64x64": (block_mask((256, 256, 1, 3), Block(64, 64)), 1, "64x64"),
        "128 rows": (block_mask((256, 64), Block(128, 1)), 1, "64x1"),
        "8x8-taps": (block_mask((32, 16, 3, 3), Block(8, 8, True)), 1, "8x8-taps"),
        "kernels": (block_mask((32, 16, 3, 3), Block(1, 1, True)), 1, "1x1-taps"),
        "ragged": (block_mask((37, 19, 3, 3), Block(8, 4)), 1, "8x4"),
        "groups": (block_mask((30, 19, 3, 3), Block(4, 1), groups=3), 3, "4x1"),
        "groups as one": (block_mask((30, 19, 3, 3), Block(4, 1), groups=3), 1, "2x1"),
        "1:2": (n_of_m_mask(1, 2, (32, 16, 3, 3)), 1, "1:2"),
        "2:4": (n_of_m_mask(2, 4, (32, 16, 3, 3)), 1, "2:4"),
        "1:4": (n_of_m_mask(1, 4, (32, 16)), 1, "1:4"),
        "4:8": (n_of_m_mask(4, 8, (32, 16)), 1, "4:8"),
        "2:4 ragged": (n_of_m_mask(2, 4, (32, 16))[:, :14], 1, "2:4"),
        "fan-in": (fan_in, 1, "fan-in"),
        "one output": (torch.tensor([[1, 0, 1, 1, 0, 0]]) == 1, 1, "channel"),
        "one output of a convolution": (torch.rand(1, 9, 3, 3) < 0.5, 1, "weight"),
        "weights": (torch.rand(32, 16, 3, 3) < 0.5, 1, "weight"),
    }


@pytest.mark.parametrize("name", described())
def test_what_is_recognised(name: str) -> None:
    mask, groups, structure = described()[name]
    assert describe(mask, groups) == structure
    if structure not in ("dense", "empty"):
        check(mask, parse(structure), groups)


@pytest.mark.parametrize("call", [describe, lambda mask, groups=1: check(mask, FanIn(), groups)])
def test_what_is_no_mask(call) -> None:
    with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool, got torch\.float32"):
        call(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"mask: expected 4 dimensions .* got shape \(2, 2, 2\)"):
        call(torch.ones(2, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="groups: expected a divisor of the 3 output channels, got 2"):
        call(torch.ones(3, 2, dtype=torch.bool), 2)
