# SPDX-License-Identifier: Apache-2.0
"""Random masks of single layers in every structure, exact and repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai import models, pruning
from fedpai.bench import BenchError
from fedpai.bench.masks import check_kind, check_structure, network_masks, uniform_mask
from fedpai_kernels.structure import check, describe, parse

SHAPES = {"conv": ((20, 10, 3, 3), 1), "grouped": ((24, 6, 3, 1), 2), "linear": ((33, 70), 1)}


def test_weights_are_exact_and_repeatable() -> None:
    mask = uniform_mask((8, 4, 3, 3), 0.1)
    assert int(mask.sum()) == 29
    assert torch.equal(mask, uniform_mask((8, 4, 3, 3), 0.1))
    assert not torch.equal(mask, uniform_mask((8, 4, 3, 3), 0.1, seed=1))
    assert int(uniform_mask((2, 2), 0.001).sum()) == 1


def test_weights_are_those_of_earlier_measurements() -> None:
    """Committed rows are of these masks."""
    assert uniform_mask((3, 4), 0.34).nonzero().tolist() == [[0, 2], [2, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("structure", ["4x1", "1x4", "8x8", "5x3-taps", "1x1-taps", "channel", "1:2", "2:5", "fan-in"])
def test_structures_are_what_they_are_called(structure: str, layer: str) -> None:
    shape, groups = SHAPES[layer]
    density = {"1:2": 0.5, "2:5": 0.4}.get(structure, 0.3)
    if structure == "8x8" and layer == "grouped":
        shape = (24, 9, 3, 1)
    mask = uniform_mask(shape, density, structure=structure, groups=groups)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    check(mask, parse(structure), groups)
    assert torch.equal(mask, uniform_mask(shape, density, structure=structure, groups=groups))
    assert not torch.equal(mask, uniform_mask(shape, density, 1, structure=structure, groups=groups))


@pytest.mark.parametrize(
    ("structure", "density", "kept"),
    [
        ("16x1", 0.25, 72 * 16),
        ("8x8-taps", 0.25, 2 * 64 * 9),
        ("channel", 0.25, 16 * 8 * 9),
        ("2:4", 0.5, 32 * 8 * 9),
        ("fan-in", 0.1, 32 * 14),
    ],
)
def test_counts_are_exact(structure: str, density: float, kept: int) -> None:
    assert int(uniform_mask((32, 16, 3, 3), density, structure=structure).sum()) == kept


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    taps=st.booleans(),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)),
    groups=st.integers(1, 3),
    density=st.floats(0.01, 1.0),
)
def test_exactly_so_many_blocks(
    rows: int, columns: int, taps: bool, sizes: tuple[int, int, int], groups: int, density: float
) -> None:
    """Counted block by block, with ragged edges and blocks that are larger than the layer."""
    outputs, inputs, side = sizes
    name = f"{rows}x{columns}{'-taps' if taps else ''}"
    mask = uniform_mask((groups * outputs, inputs, side, 1), density, structure=name, groups=groups)
    kept = blocks = 0
    for group in mask.chunk(groups):
        for strip in group.split(rows):
            for block in strip.split(columns, 1):
                for piece in [block] if taps else block.split(1, 2):
                    blocks += 1
                    kept += bool(piece.any())
                    assert bool(piece.all()) == bool(piece.any())
    assert kept == max(1, round(density * blocks))


@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(64, 32, 1), (20, 10, 2), (3, 1, 3)])
def test_channels_keep_the_root_of_the_density_on_both_sides(outputs: int, inputs: int, groups: int) -> None:
    mask = uniform_mask((groups * outputs, inputs, 3, 3), 0.25, structure="channel", groups=groups)
    for group in mask.chunk(groups):
        pairs = group.flatten(2).any(2)
        assert int(pairs.any(1).sum()) == max(1, round(outputs / 2))
        assert int(pairs.any(0).sum()) == max(1, round(inputs / 2))


@pytest.mark.parametrize(("inputs", "kept"), [(5, 1), (6, 1), (7, 2)])
def test_what_is_left_of_a_ragged_run_keeps_its_share_rounded_up(inputs: int, kept: int) -> None:
    mask = uniform_mask((6, inputs, 2, 2), 0.5, structure="2:4")
    assert set(mask[:, :4].sum(1).flatten().tolist()) == {2}
    assert set(mask[:, 4:].sum(1).flatten().tolist()) == {kept}


def test_every_output_keeps_the_same_share() -> None:
    mask = uniform_mask((40, 11, 3, 3), 0.05, structure="fan-in")
    assert set(mask.flatten(1).sum(1).tolist()) == {round(0.05 * 99)}
    assert describe(mask) == "fan-in"
    assert set(uniform_mask((4, 9), 0.001, structure="fan-in").sum(1).tolist()) == {1}


def test_draws_are_uniform() -> None:
    """Each block of a mask is as likely as the others: 300 draws, within five standard deviations."""
    draws = [uniform_mask((8, 4), 0.25, seed, structure="4x2") for seed in range(300)]
    share = torch.stack(draws).float().mean(0)
    assert float((share - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 300)


@pytest.mark.parametrize(
    ("structure", "density", "words"),
    [
        ("2:4", 0.1, "--structure 2:4: got a density of 0.1, its masks keep 0.5"),
        ("0x4", 0.1, "--structure: got '0x4', expected 'weight', a block"),
        ("", 0.1, "--structure: got ''"),
    ],
)
def test_mistakes(structure: str, density: float, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        uniform_mask((8, 8), density, structure=structure)


def test_unknown_structures_are_refused_before_anything_is_scored() -> None:
    with pytest.raises(BenchError, match="--structure: got '4:2'"):
        check_structure("4:2")
    with pytest.raises(BenchError, match="--structure: got '4:2'"):
        network_masks(torch.nn.Linear(2, 2), "uniform", 0.5, structure="4:2")


def test_an_allocation_after_the_criterion() -> None:
    assert check_kind("grasp") == ("grasp", None)
    assert check_kind("grasp@time:1.5") == ("grasp", "time:1.5")
    model = models.create("conv4", width=0.1)
    masks, data = network_masks(model, "magnitude@time:0.5", 0.9)
    assert data is None
    expected = pruning.prune(model, 0.9, "magnitude", allocation="time:0.5")
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gras", "--mask: unknown kind 'gras'"),
        ("gras@time", "--mask: unknown kind 'gras@time'"),
        ("random@", "--mask random@: allocation: got ''"),
        ("random@time:fast", "--mask random@time:fast: allocation: got 'time:fast'"),
        ("erk@time", "--mask erk@time: allocation: criterion 'erk' is an allocation itself"),
        ("random@time:0.001", "--mask random@time:0.001: allocation: 'time:0.001' is less than"),
    ],
)
def test_unknown_kinds(kind: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        network_masks(models.create("conv4", width=0.1), kind, 0.9)
