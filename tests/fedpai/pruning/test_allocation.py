# SPDX-License-Identifier: Apache-2.0
"""Allocations by multiply-adds and by time: against slow solvers, exact totals, bounds, and what is refused."""

from __future__ import annotations

import heapq
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fedpai import models, pruning
from fedpai.pruning import allocate, chooser, cost, kept_count, parse_allocation
from fedpai.pruning.allocation import NAMES, TIME

Shapes = dict[str, tuple[int, ...]]
Prices = dict[str, float]


@st.composite
def networks(draw: st.DrawFn, largest: int = 12) -> tuple[Shapes, Prices]:
    """Shapes of a few layers and what a weight of each costs."""
    side = st.integers(1, largest)
    convolution = st.tuples(side, side, st.integers(1, 3), st.integers(1, 3))
    shapes = draw(st.lists(st.one_of(convolution, st.tuples(side, side)), min_size=1, max_size=6))
    prices = draw(st.lists(st.integers(1, 1024), min_size=len(shapes), max_size=len(shapes)))
    names = [f"l{i}" for i in range(len(shapes))]
    return dict(zip(names, shapes, strict=True)), dict(zip(names, map(float, prices), strict=True))


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def spent(counts: dict[str, int], prices: Prices) -> float:
    return sum(count * prices[name] for name, count in counts.items())


def of_uniform(shapes: Shapes, prices: Prices, kept: int) -> float:
    """The time that uniform densities take."""
    whole = {name: size(shape) for name, shape in shapes.items()}
    return spent(whole, prices) * kept / sum(whole.values())


# ------------------------------------------------------------------------------------------------------- slow solvers


def level_slowly(shapes: Shapes, prices: Prices, kept: int) -> dict[str, Fraction]:
    """Equal multiply-adds in all layers that no bound holds, by exact fractions: between two neighbouring levels at
    which a layer is full or leaves its one weight, the count is a straight line of the level."""
    price = {name: Fraction(p) for name, p in prices.items()}

    def at(level: Fraction) -> dict[str, Fraction]:
        return {n: min(max(level / price[n], Fraction(1)), Fraction(size(s))) for n, s in shapes.items()}

    corners = sorted({Fraction(0), *(price[n] * b for n, s in shapes.items() for b in (1, size(s)))})
    for low, high in itertools.pairwise(corners):
        below, above = sum(at(low).values()), sum(at(high).values())
        if below <= kept <= above:
            return at(low + (high - low) * Fraction(kept - below) / (above - below) if above > below else low)
    return at(corners[-1])


def greedy(shapes: Shapes, prices: Prices, kept: int, factor: float) -> dict[str, int]:
    """The counts that maximise ``sum (out + in + kh + kw) log(count) - factor * time``: one weight after the other,
    where it gains most. Greedy is exact, because the gains fall."""
    counts = dict.fromkeys(shapes, 1)

    def gain(name: str) -> float:
        count = counts[name]
        return sum(shapes[name]) * math.log((count + 1) / count) - factor * prices[name]

    heap = [(-gain(name), name) for name in shapes if size(shapes[name]) > 1]
    heapq.heapify(heap)
    for _ in range(kept - len(shapes)):
        _, name = heapq.heappop(heap)
        counts[name] += 1
        if counts[name] < size(shapes[name]):
            heapq.heappush(heap, (-gain(name), name))
    return counts


def best_slowly(shapes: Shapes, prices: Prices, kept: int, limit: float) -> dict[str, int]:
    """By the smallest factor of the time under which the greedy counts take no longer than the limit."""
    budget = limit * of_uniform(shapes, prices, kept)
    if spent(greedy(shapes, prices, kept, 0.0), prices) <= budget:
        return greedy(shapes, prices, kept, 0.0)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        if spent(greedy(shapes, prices, kept, middle), prices) > budget:
            low = middle
        else:
            high = middle
    return greedy(shapes, prices, kept, high)


@given(networks(), st.floats(0, 0.98))
@settings(max_examples=60, deadline=None)
def test_flops_gives_every_layer_the_same_multiply_adds(network: tuple[Shapes, Prices], sparsity: float) -> None:
    shapes, prices = network
    kept = kept_count(sum(map(size, shapes.values())), sparsity)
    assume(kept >= len(shapes))
    counts = allocate(shapes, sparsity, "flops", prices=prices)
    assert sum(counts.values()) == kept
    expected = level_slowly(shapes, prices, kept)
    assert sum(expected.values()) == kept
    for name, count in counts.items():
        assert 1 <= count <= size(shapes[name])
        assert abs(count - expected[name]) < 1 + Fraction(1, 10**6)


@given(networks(), st.floats(0.3, 0.95), st.floats(0.3, 2.5))
@settings(max_examples=40, deadline=None)
def test_time_finds_the_best_counts_within_it(network: tuple[Shapes, Prices], sparsity: float, limit: float) -> None:
    shapes, prices = network
    kept = kept_count(sum(map(size, shapes.values())), sparsity)
    assume(kept >= len(shapes))
    slow = best_slowly(shapes, prices, kept, limit)
    budget = limit * of_uniform(shapes, prices, kept)
    assume(spent(slow, prices) <= budget)
    counts = allocate(shapes, sparsity, f"time:{limit!r}", prices=prices)
    assert sum(counts.values()) == kept
    assert all(1 <= counts[name] <= size(shape) for name, shape in shapes.items())
    # Rounding moves less than one weight a layer.
    assert spent(counts, prices) < budget + sum(prices.values())

    def value(found: dict[str, int]) -> float:
        return sum(sum(shapes[name]) * math.log(count) for name, count in found.items())

    # What one weight too few in every layer would cost is what rounding may cost.
    slack = sum(sum(shapes[n]) * math.log(c / max(1, c - 1)) for n, c in slow.items() if c > 1)
    assert value(counts) >= value(slow) - slack - 1e-9


def test_two_layers_have_no_choice() -> None:
    """Count and time are two equations: n + m = 100 and 10 n + m = 280 give 20 and 80."""
    shapes, prices = {"a": (20, 10), "b": (80, 10)}, {"a": 10.0, "b": 1.0}
    limit = 280 / of_uniform(shapes, prices, 100)
    assert allocate(shapes, 0.9, f"time:{limit}", prices=prices) == {"a": 20, "b": 80}
    # Without the bound it is erk, 30 to 90 weights of 100.
    assert allocate(shapes, 0.9, "time:9", prices=prices) == {"a": 25, "b": 75}
    assert allocate(shapes, 0.9, "erk") == {"a": 25, "b": 75}


def test_multiply_adds_by_hand() -> None:
    """c is full with 8 multiply-adds; the other 60 weights do 160 each."""
    shapes, prices = {"a": (30, 10), "b": (10, 10), "c": (2, 2)}, {"a": 4.0, "b": 8.0, "c": 2.0}
    assert allocate(shapes, 1 - 64 / 404, "flops", prices=prices) == {"a": 40, "b": 20, "c": 4}


@given(networks(), st.floats(0.3, 0.95), st.floats(0.3, 2.5), st.floats(0.3, 2.5))
@settings(max_examples=60, deadline=None)
def test_more_time_is_never_worse(
    network: tuple[Shapes, Prices], sparsity: float, one: float, two: float
) -> None:
    shapes, prices = network
    assume(kept_count(sum(map(size, shapes.values())), sparsity) >= len(shapes))
    spending = []
    for limit in sorted((one, two)):
        try:
            counts = allocate(shapes, sparsity, f"time:{limit!r}", prices=prices)
        except ValueError:
            assume(False)
        spending.append(spent(counts, prices))
    assert spending[0] < spending[1] + sum(prices.values())


@given(networks(), st.floats(0, 0.95), st.floats(0, 0.95))
@settings(max_examples=60, deadline=None)
def test_more_weights_take_none_away(network: tuple[Shapes, Prices], one: float, two: float) -> None:
    shapes, prices = network
    low, high = sorted((one, two))
    assume(kept_count(sum(map(size, shapes.values())), high) >= len(shapes))
    few, many = (allocate(shapes, s, "flops", prices=prices) for s in (high, low))
    assert all(few[name] <= many[name] + 1 for name in shapes)  # largest remainders may turn one round


def test_units_of_prices_do_not_matter() -> None:
    shapes, prices = {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (10, 64)}, {"a": 1024.0, "b": 256.0, "c": 1.0}
    scaled = {name: price * 2.0**-10 for name, price in prices.items()}
    for allocation in ("flops", "time", "time:0.8"):
        assert allocate(shapes, 0.9, allocation, prices=prices) == allocate(
            shapes, 0.9, allocation, prices=scaled
        )


@pytest.mark.parametrize("allocation", ["flops", "time:1.2", "time:9"])
@pytest.mark.parametrize(("sparsity", "alive"), [(0.0, True), (0.9, True), (0.9, False), (0.9959, True)])
def test_ends_of_the_range(allocation: str, sparsity: float, alive: bool) -> None:
    shapes: Shapes = {"a": (64, 3, 3, 3), "b": (1, 1), "c": (10, 64)}
    prices = {"a": 1.0, "b": 1e-6, "c": 1e6}
    counts = allocate(shapes, sparsity, allocation, keep_layers_alive=alive, prices=prices)
    assert sum(counts.values()) == kept_count(2369, sparsity)
    assert all(int(alive) <= counts[name] <= size(shape) for name, shape in shapes.items())


# -------------------------------------------------------------------------------------------------------- real networks


def of_network(name: str) -> tuple[nn.Module, Shapes, dict[str, int]]:
    model = models.create(name, in_channels=1)
    layers = pruning.prunable_layers(model)
    return model, {n: tuple(m.weight.shape) for n, m in layers.items()}, cost.positions(model, layers)


@pytest.mark.parametrize("name", ["resnet18", "vgg19"])
def test_time_keeps_few_multiply_adds_and_the_thin_layers(name: str) -> None:
    model, shapes, positions = of_network(name)
    prices = cost.nanoseconds(model, pruning.prunable_layers(model))
    counts = allocate(shapes, 0.98, "time", prices=prices)
    dense = sum(size(shape) * positions[n] for n, shape in shapes.items())
    assert 0.015 < spent(counts, {n: float(p) for n, p in positions.items()}) / dense < 0.03
    assert spent(counts, prices) == pytest.approx(TIME * of_uniform(shapes, prices, sum(counts.values())), rel=1e-3)
    first, *_, last = shapes
    assert counts[first] > 0.1 * size(shapes[first])
    assert counts[last] == size(shapes[last])


def test_everybody_finds_the_same_counts() -> None:
    """Masks are agreed on by computing them: these counts must not depend on the machine."""
    model, shapes, _ = of_network("conv4")
    prices = cost.nanoseconds(model, pruning.prunable_layers(model))
    counts = allocate(shapes, 0.95, "time:1.25", prices=prices)
    assert list(counts.values()) == [576, 1656, 2447, 3237, 104391, 6327, 2560]


def tiny() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A network of 3x3 convolutions with strides and shortcuts, and images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return models.create("resnet18", width=0.0625, seed=0), (images, torch.arange(8))


# N:M and channels fix layers' shares by themselves (test_time_has_a_budget_of_its_own).
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "flops", "time"])
@pytest.mark.parametrize("structure", ["weight", "4x1", "fan-in"])
def test_every_criterion_under_every_allocation(allocation: str, structure: str) -> None:
    model, batch = tiny()
    counts = []
    for criterion in ("random", "magnitude", "snip", "grasp", "synflow"):
        more = {"iterations": 3} if criterion == "synflow" else {}
        masks = pruning.prune(
            model, 0.8, criterion, allocation=allocation, data=batch, structure=structure, **more
        )
        assert all(mask.any() for mask in masks.values())
        counts.append({name: int(mask.sum()) for name, mask in masks.items()})
        wanted, kept = kept_count(sum(m.numel() for m in masks.values()), 0.8), sum(counts[-1].values())
        assert kept == wanted if structure == "weight" else wanted - 64 < kept <= wanted
        chooser(model, 0.8, allocation=allocation, structure=structure).check(masks)
    if allocation != "global" and structure == "weight":
        assert all(found == counts[0] for found in counts)


@pytest.mark.parametrize("structure", ["weight", "4x4", "fan-in"])
def test_equal_multiply_adds_of_a_budget_of_multiply_adds(structure: str) -> None:
    """Layers with room spend the same; what whole units leave over goes round."""
    model, _ = tiny()
    masks = pruning.prune(model, 0.9, "magnitude", allocation="flops", budget="flops", structure=structure)
    kept = pruning.summary(masks, model)
    assert kept.kept_macs <= kept_count(kept.macs, 0.9)
    roomy = [row.kept_macs for row in kept.rows if row.density < 0.7 and row.kind == "conv2d"]
    assert len(roomy) > 10
    assert max(roomy) - min(roomy) <= 2 * 16 * 1024


def test_the_same_masks_again() -> None:
    model, batch = tiny()
    for criterion in ("random", "grasp"):
        one, two = (pruning.prune(model, 0.9, criterion, allocation="time", data=batch) for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_mask_of_another_allocation_is_refused() -> None:
    model, _ = tiny()
    fast = chooser(model, 0.9, allocation="time")
    fast.check(fast.random(seed=1))
    with pytest.raises(ValueError, match=r"mask of conv1 keeps \d+ weights, the agreed allocation \d+"):
        fast.check(pruning.prune(model, 0.9, "random", allocation="erk"))


def test_a_price_is_positions_times_the_kind_of_layer() -> None:
    class Kinds(nn.Module):
        input_shape = (3, 8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(3, 4, 3, padding=1)
            self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1)
            self.pointwise = nn.Conv2d(4, 4, 1, stride=2)
            self.fc = nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.pointwise(self.strided(self.plain(x))).flatten(1))

    model = Kinds()
    layers = pruning.prunable_layers(model)
    assert cost.positions(model, layers) == {"plain": 64, "strided": 16, "pointwise": 4, "fc": 1}
    table = cost.NANOSECONDS
    expected = {
        "plain": 64 * table["conv2d"],
        "strided": 16 * table["strided"],
        "pointwise": 4 * table["pointwise"],
        "fc": table["linear"],
    }
    assert cost.nanoseconds(model, layers) == expected


# ------------------------------------------------------------------------------------------------------ what is refused

ONE: Shapes = {"a": (4, 4), "b": (2, 2)}
CHEAP = {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"allocation": "layer"}, "allocation: got 'layer', expected one of global, uniform, erk, flops, time"),
        ({"allocation": "erk:2"}, "allocation: got 'erk:2', expected one of"),
        ({"allocation": "time:"}, "allocation: got 'time:', expected a positive number after 'time:'"),
        ({"allocation": "time:x"}, "expected a positive number after"),
        ({"allocation": "time:-1"}, "expected a positive number after"),
        ({"allocation": "time:inf"}, "expected a positive number after"),
        ({"allocation": "time:nan"}, "expected a positive number after"),
        ({"allocation": "global"}, "allocation: got 'global', which fixes no counts"),
        ({"allocation": "flops"}, "allocation: got 'flops', which needs what a weight of each layer costs"),
        ({"allocation": "time"}, "allocation: got 'time', which needs"),
        ({"allocation": "time", "prices": {"a": 1.0}}, "prices: layers b are missing or unknown"),
        ({"allocation": "flops", "prices": {**CHEAP, "c": 1.0}}, "prices: layers c are missing or unknown"),
        ({"allocation": "flops", "prices": {"a": 1.0, "b": 0.0}}, "prices: b costs 0.0, expected a positive"),
        ({"allocation": "time", "prices": {"a": math.nan, "b": 1.0}}, "prices: a costs nan, expected a positive"),
        (
            {"allocation": "time:0.5", "prices": CHEAP},
            r"allocation: 'time:0.5' is less than 10 weights can take; the cheapest take 0\.917 times",
        ),
    ],
)
def test_refusals(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(ONE, 0.5, **kwargs)


def test_names() -> None:
    assert parse_allocation("time") == ("time", TIME)
    assert parse_allocation("time:2.5") == ("time", 2.5)
    assert [parse_allocation(name)[0] for name in NAMES] == list(NAMES)


def test_time_has_a_budget_of_its_own() -> None:
    model = models.create("conv4", width=0.1)
    with pytest.raises(ValueError, match="allocation: 'time' shares out weights, expected another one with budget"):
        chooser(model, 0.9, allocation="time", budget="flops")
    with pytest.raises(ValueError, match="got 'time', expected one of global, uniform for structure 'channel'"):
        chooser(model, 0.9, allocation="time", structure="channel")
    with pytest.raises(ValueError, match="got 'flops', but structure 2:4 keeps the same share"):
        chooser(model, 0.5, allocation="flops", structure="2:4")


def test_layers_that_do_not_run_have_no_price() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    model = Idle()
    with pytest.raises(ValueError, match="allocation: idle computes nothing for one image"):
        chooser(model, 0.5, allocation="time", input_shape=(4,))
