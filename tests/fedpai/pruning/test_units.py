# SPDX-License-Identifier: Apache-2.0
"""Blocks and equal fan-in: what a unit's score is, which units are kept, and how many weights that makes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fedpai.pruning import chooser, kept_count, masks_from_scores, structured_masks, summary
from fedpai.pruning.units import Blocks, FanIns, best_together, descend
from fedpai_kernels.structure import Block, FanIn, check, parse

Tensors = dict[str, torch.Tensor]
sparsities = st.floats(0, 0.95)


class Small(nn.Module):
    """Ragged sizes, groups, two image sizes and a linear layer, with few distinct weights, so that ties are
    everywhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 10, 3, padding=1)
        self.two = nn.Conv2d(10, 6, (1, 3), stride=2, groups=2)
        self.fc = nn.Linear(6, 5)
        self.input_shape = (3, 6, 6)
        generator = torch.Generator().manual_seed(seed)
        for module in (self.one, self.two, self.fc):
            module.weight.data = torch.randint(-3, 4, module.weight.shape, generator=generator) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


def scores_of(model: nn.Module) -> Tensors:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def blocks_slowly(weight: torch.Tensor, structure: str, groups: int) -> list[list[int]]:
    """Flat positions of every block's weights, by loops, in the order of group, rows, columns, taps."""
    kind = parse(structure)
    rows, inputs, whole = (kind.rows, kind.columns, kind.taps) if isinstance(kind, Block) else (1, 1, False)
    out, columns, *kernel = weight.shape
    taps = int(np.prod(kernel))
    places: dict[tuple[int, ...], list[int]] = {}
    for o in range(out):
        group, row = divmod(o, out // groups)
        for i in range(columns):
            for tap in range(taps):
                key = (group, row // rows, i // inputs, 0 if whole else tap)
                places.setdefault(key, []).append((o * columns + i) * taps + tap)
    return [places[key] for key in sorted(places)]


def down_slowly(ranked: list[tuple[float, int, object]], budget: int) -> set[object]:
    """Keeps what still fits: (score, cost, name) in any order; earlier ones win ties."""
    kept = set()
    for _, cost, name in sorted(ranked, key=lambda unit: -unit[0]):
        if cost <= budget:
            budget -= cost
            kept.add(name)
    return kept


POSITIONS = {"one": 36, "two": 3 * 2, "fc": 1}


@given(
    st.integers(0, 50),
    st.sampled_from(["4x1", "1x2", "3x2", "2x2-taps", "1x1-taps", "weight"]),
    sparsities,
    st.sampled_from(["weights", "flops"]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_best_blocks_that_fit(
    seed: int, structure: str, sparsity: float, budget: str, alive: bool
) -> None:
    model = Small(seed)
    scores = scores_of(model)
    prices = POSITIONS if budget == "flops" else dict.fromkeys(POSITIONS, 1)
    units: list[tuple[float, int, object]] = []
    for name, score in scores.items():
        flat = score.double().flatten()
        places = blocks_slowly(score, structure, getattr(model.get_submodule(name), "groups", 1))
        means = [float(flat[place].sum()) / len(place) for place in places]
        if alive:
            means[means.index(max(means))] = float("inf")
        units += [
            (mean, len(place) * prices[name], (name, *place))
            for mean, place in zip(means, places, strict=True)
        ]
    count = kept_count(sum(cost for _, cost, _ in units), sparsity)
    largest: dict[str, int] = {}
    for _, cost, (name, *_) in units:  # type: ignore[misc]
        largest[name] = max(largest.get(name, 0), cost)
    make = functools.partial(
        structured_masks, model, scores, sparsity, structure=structure, budget=budget, keep_layers_alive=alive
    )
    if count < (sum(largest.values()) if alive else min(cost for _, cost, _ in units)):
        with pytest.raises(ValueError, match=f"sparsity: {sparsity} keeps "):
            make()
        return
    masks = make()
    expected = down_slowly(units, count)
    for name, mask in masks.items():
        places = {i for unit in expected if unit[0] == name for i in unit[1:]}  # type: ignore[index]
        assert set(mask.flatten().nonzero().flatten().tolist()) == places
        assert mask.any() or not alive


def test_equal_blocks_make_whole_multiples() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16), nn.Linear(16, 32))
    total = 32 * 64 + 64 * 16 + 16 * 32
    for sparsity in (0.0, 0.31, 0.5, 0.77, 0.9):
        for allocation in ("global", "uniform", "erk"):
            masks = structured_masks(
                model, scores_of(model), sparsity, structure="16x1", allocation=allocation
            )
            assert sum(int(m.sum()) for m in masks.values()) == kept_count(total, sparsity) // 16 * 16


@given(st.integers(0, 50), st.sampled_from(["4x1", "3x2", "1x1-taps", "fan-in"]), sparsities, st.booleans())
@settings(max_examples=100, deadline=None)
def test_allocations_count_in_whole_units(seed: int, structure: str, sparsity: float, uniform: bool) -> None:
    model = Small(seed)
    scores = scores_of(model)
    allocation = "uniform" if uniform else "erk"
    try:
        masks = structured_masks(model, scores, sparsity, structure=structure, allocation=allocation)
    except ValueError:
        assume(False)
    kept = sum(int(m.sum()) for m in masks.values())
    left = kept_count(sum(s.numel() for s in scores.values()), sparsity) - kept
    assert left >= 0
    for name, mask in masks.items():
        groups = getattr(model.get_submodule(name), "groups", 1)
        kind = parse(structure)
        assert isinstance(kind, Block | FanIn)
        cut = Blocks(mask.shape, kind, groups) if isinstance(kind, Block) else FanIns(mask.shape)
        units = cut.units(scores[name], None)
        flags = np.array(cut.units(mask.double(), None).scores)
        if isinstance(kind, Block):
            assert set(flags.tolist()) <= {0.0, 1.0}
            # Nothing that is left out would still fit.
            assert mask.all() or units.sizes[flags == 0].min() > left
        else:
            check(mask, kind)
            assert mask.all() or len(mask) > left
        if uniform:
            share = (1 - sparsity) * mask.numel()
            assert abs(int(mask.sum()) - share) <= 2 * cut.largest + 1


def test_one_by_one_blocks_are_weights() -> None:
    scores = scores_of(Small())
    cuts = {n: Blocks(s.shape, None, 1) for n, s in scores.items()}
    units = {n: cuts[n].units(s, None) for n, s in scores.items()}
    total = sum(s.numel() for s in scores.values())
    together = best_together(units, dict.fromkeys(units, 1), kept_count(total, 0.7), True)
    expected = masks_from_scores(scores, 0.7)
    assert all(torch.equal(together[n], expected[n]) for n in scores)


def test_scores_are_added_with_their_signs() -> None:
    """A strong pair of opposite signs is worth nothing, as in GraSP."""
    score = torch.tensor([[9.0, 0.1, 0.0, 0.2], [-9.0, 0.1, 0.1, 0.2]])
    masks = structured_masks(nn.Linear(4, 2), {"": score}, 0.5, structure="2x1")
    assert masks[""].tolist() == [[False, True, False, True]] * 2


def test_a_cut_block_competes_by_its_mean() -> None:
    """The last block has one row instead of two: a smaller sum, but a higher mean."""
    score = torch.tensor([[1.0], [1.0], [1.5]])
    masks = structured_masks(nn.Linear(1, 3), {"": score}, 0.6, structure="2x1", keep_layers_alive=False)
    assert masks[""].flatten().tolist() == [False, False, True]


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=40), st.integers(0, 200)
)
@settings(max_examples=200, deadline=None)
def test_descend(units: list[tuple[int, int]], budget: int) -> None:
    scores, costs = (np.array(values) for values in zip(*units, strict=True))
    expected = down_slowly([(score, cost, i) for i, (score, cost) in enumerate(units)], budget)
    assert set(np.flatnonzero(descend(scores.astype(np.float64), costs, budget))) == expected


@given(st.integers(0, 50), st.sampled_from(["4x1", "3x2", "2x2-taps", "fan-in"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_within_never_brings_a_weight_back(seed: int, structure: str, layered: bool) -> None:
    model = Small(seed)
    choose = chooser(model, 0.7, structure=structure, scope="layer" if layered else "global")
    generator = torch.Generator().manual_seed(seed)
    masks = None
    kept = []
    for part in (0.25, 0.5, 0.75, 1.0):
        scores = {n: torch.randn(s.shape, generator=generator) for n, s in scores_of(model).items()}
        if masks is not None:  # as SynFlow: what is gone scores zero
            scores = {n: s.abs() * masks[n] for n, s in scores.items()}
        now = choose.masks(scores, masks, part)
        assert masks is None or all((now[n] <= masks[n]).all() for n in now)
        masks = now
        kept.append(sum(int(m.sum()) for m in masks.values()))
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] <= kept_count(sum(m.numel() for m in masks.values()), 0.7)


def test_fan_in_keeps_each_outputs_best() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.5, 0.0, 0.1], [9.0, 9.0, 8.0, 7.0]])
    masks = structured_masks(nn.Linear(4, 3), {"": score}, 0.4, structure="fan-in")
    # 7 of 12 weights: two for each of three outputs.
    assert masks[""].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]


def test_n_of_m_keeps_the_best_of_each_run() -> None:
    model = nn.Sequential(nn.Conv2d(8, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    first = torch.tensor([1.0, 2, 3, 4, 8, 7, 6, 5]).expand(3, 8)[..., None, None]
    masks = structured_masks(
        model, {"0": first, "2": torch.tensor([[1.0, 3, 2], [5, 5, 5]])}, 0.5, structure="2:4"
    )
    assert masks["0"].flatten(1).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 3
    # A run of three keeps two: half of it, rounded up.
    assert masks["2"].tolist() == [[0, 1, 1], [1, 1, 0]]


def test_multiply_adds_decide_under_flops() -> None:
    model = Small()
    total = summary({}, model).macs
    for structure in ("weight", "4x1", "2x2-taps", "fan-in"):
        for allocation in ("global", "uniform", "erk"):
            masks = structured_masks(
                model, scores_of(model), 0.6, structure=structure, allocation=allocation, budget="flops"
            )
            kept = sum(int(m.sum()) * POSITIONS[n] for n, m in masks.items())
            assert summary(masks, model).kept_macs == kept
            assert kept <= kept_count(total, 0.6)
            slack = 0 if structure == "weight" and allocation == "global" else max(POSITIONS.values()) * 12
            assert kept_count(total, 0.6) - kept <= slack
    model.idle = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="budget: idle computes nothing for one image, expected layers that run"
    ):
        structured_masks(model, scores_of(model), 0.6, budget="flops")


call = functools.partial(structured_masks, Small())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"structure": "0x4"}, "structure: got '0x4', expected 'weight', a block such as '16x1'"),
        (
            {"structure": "16x1"},
            "a block of 16x1 is larger than every layer; the largest has 10 output and 3 input",
        ),
        (
            {"structure": "4x1", "sparsity": 0.98},
            "keeps 8 of 390, less than the 11 of one unit in each of 3 layers of structure 4x1; lower it, or allow",
        ),
        (
            {"structure": "4x1", "sparsity": 0.9999, "keep_layers_alive": False},
            "keeps 0 of 390, less than the 1 of the smallest unit of structure 4x1; lower it$",
        ),
        (
            {"structure": "2:4", "sparsity": 0.9},
            "sparsity: got 0.9, but structure 2:4 removes 0.5 of the weights",
        ),
        (
            {"structure": "4:8", "sparsity": 0.5},
            "structure: 4:8 is wider than every layer; the widest has 6 input",
        ),
        (
            {"structure": "2:4", "sparsity": 0.5, "allocation": "erk"},
            "allocation: got 'erk', but structure 2:4",
        ),
        ({"budget": "time"}, "budget: got 'time', expected one of weights, flops"),
        (
            {"budget": "flops", "allocation": {"one": 5}},
            "counts are of weights, expected a name with budget 'flops'",
        ),
        ({"structure": "4x1", "allocation": {"one": 3, "two": 1, "fc": 0}}, "allocation: one gets 3 weights"),
    ],
)
def test_refusals(kwargs: dict, message: str) -> None:
    scores = scores_of(Small())
    with pytest.raises(ValueError, match=message):
        call(scores, **{"sparsity": 0.5, **kwargs})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((10, 3, 3, 3), torch.nan), "scores: one has 270 of 270 scores that are NaN"),
        (torch.zeros(10, 3, 3), r"scores: one is torch.float32 \(10, 3, 3\), expected floating-point"),
    ],
)
@pytest.mark.parametrize(("structure", "sparsity"), [("4x1", 0.5), ("2:4", 0.5), ("fan-in", 0.5)])
def test_bad_scores(bad: torch.Tensor, message: str, structure: str, sparsity: float) -> None:
    with pytest.raises(ValueError, match=message):
        call({**scores_of(Small()), "one": bad}, sparsity, structure=structure)


def test_scores_of_an_unknown_layer() -> None:
    with pytest.raises(ValueError, match="scores: no convolution or linear layer is called four, three"):
        call({**scores_of(Small()), "three": torch.rand(2), "four": torch.rand(2)}, 0.5)
