# SPDX-License-Identifier: Apache-2.0
"""Exact budgets, ties, living layers, allocations and averages."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpai.pruning import allocate, average_scores, kept_count, masks_from_scores

sparsities = st.floats(0, 0.99)
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@st.composite
def layered_scores(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Few distinct values, so that ties are everywhere."""
    value = st.integers(-2, 2).map(float)
    return {
        f"l{i}": torch.tensor(draw(st.lists(value, min_size=n, max_size=n)))
        for i, n in enumerate(draw(sizes))
    }


def keep_slowly(scores: dict[str, torch.Tensor], count: int, alive: bool) -> set[tuple[str, int]]:
    """Sort everything; swap the worst of well-kept layers for the best of empty ones."""
    order = {name: i for i, name in enumerate(scores)}
    ranked = sorted(
        ((-v, order[n], i, n) for n, s in scores.items() for i, v in enumerate(s.flatten().tolist()))
    )
    chosen = ranked[:count]
    if alive:
        empty = [n for n in scores if n not in {entry[3] for entry in chosen}]
        best = [next(entry for entry in ranked if entry[3] == n) for n in empty]
        first = {next(entry for entry in ranked if entry[3] == n) for n in scores}
        removable = [entry for entry in reversed(chosen) if entry not in first]
        chosen = [entry for entry in chosen if entry not in removable[: len(best)]] + best
    return {(entry[3], entry[2]) for entry in chosen}


@given(layered_scores(), sparsities, st.booleans())
@settings(max_examples=100, deadline=None)
def test_global_masks_keep_the_best_and_exactly_the_budget(
    scores: dict[str, torch.Tensor], sparsity: float, alive: bool
) -> None:
    total = sum(s.numel() for s in scores.values())
    count = round((1 - sparsity) * total)
    assume(count >= (len(scores) if alive else 1))
    masks = masks_from_scores(scores, sparsity, keep_layers_alive=alive)
    kept = {(n, i) for n, m in masks.items() for i in m.flatten().nonzero().flatten().tolist()}
    assert kept == keep_slowly(scores, count, alive)
    assert len(kept) == kept_count(total, sparsity)
    assert not alive or all(m.any() for m in masks.values())


@given(layered_scores(), sparsities, st.sampled_from(["uniform", "erk"]))
@settings(max_examples=100, deadline=None)
def test_layer_masks_keep_each_layers_best_and_exactly_the_budget(
    scores: dict[str, torch.Tensor], sparsity: float, allocation: str
) -> None:
    total = sum(s.numel() for s in scores.values())
    assume(round((1 - sparsity) * total) >= len(scores))
    masks = masks_from_scores(scores, sparsity, "layer", allocation=allocation)
    assert sum(int(m.sum()) for m in masks.values()) == kept_count(total, sparsity)
    for name, mask in masks.items():
        order = scores[name].argsort(descending=True, stable=True)
        expected = torch.zeros_like(mask)
        expected[order[: int(mask.sum())]] = True
        assert mask.any()
        assert torch.equal(mask, expected)


@given(layered_scores(), sparsities, sparsities)
@settings(max_examples=100, deadline=None)
def test_within_never_brings_a_weight_back(scores: dict[str, torch.Tensor], one: float, two: float) -> None:
    total = sum(s.numel() for s in scores.values())
    low, high = sorted((one, two))
    assume(round((1 - high) * total) >= len(scores))
    first = masks_from_scores(scores, low)
    turned = {n: -s for n, s in scores.items()}
    second = masks_from_scores(turned, high, within=first)
    assert sum(int(m.sum()) for m in second.values()) == kept_count(total, high)
    assert all((second[n] <= first[n]).all() for n in first)


@given(sizes, sparsities, st.sampled_from(["uniform", "erk"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_allocation_is_exact_and_within_bounds(
    numbers: list[int], sparsity: float, allocation: str, alive: bool
) -> None:
    total = sum(numbers)
    assume(round((1 - sparsity) * total) >= (len(numbers) if alive else 1))
    counts = allocate(
        {f"l{i}": (n,) for i, n in enumerate(numbers)}, sparsity, allocation, keep_layers_alive=alive
    )
    assert sum(counts.values()) == kept_count(total, sparsity)
    assert all(int(alive) <= counts[f"l{i}"] <= n for i, n in enumerate(numbers))


RESNET_LIKE = {
    "stem": (64, 3, 3, 3),
    "a": (64, 64, 3, 3),
    "b": (128, 64, 3, 3),
    "one": (128, 64, 1, 1),
    "fc": (10, 128),
}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.98])
def test_erk_against_the_published_iteration(sparsity: float) -> None:
    """Solve for eps with capped layers set aside, again until none exceeds density 1."""
    size = {n: math.prod(s) for n, s in RESNET_LIKE.items()}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(size.values()) - sum(size[n] for n in dense)
        eps = budget / sum(sum(s) for n, s in RESNET_LIKE.items() if n not in dense)
        density = {n: eps * sum(s) / size[n] for n, s in RESNET_LIKE.items() if n not in dense}
        over = {n for n, d in density.items() if d > 1}
        if not over:
            break
        dense |= over
    counts = allocate(RESNET_LIKE, sparsity, "erk")
    for name, count in counts.items():
        expected = size[name] if name in dense else density[name] * size[name]
        assert abs(count - expected) < 1


def test_uniform_gives_every_layer_the_same_density() -> None:
    counts = allocate(RESNET_LIKE, 0.9, "uniform")
    assert all(abs(counts[n] - 0.1 * math.prod(s)) < 1 for n, s in RESNET_LIKE.items())


def test_given_counts_are_used() -> None:
    scores = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    masks = masks_from_scores(scores, 0.5, allocation={"a": 1, "b": 4})
    assert masks["a"].tolist() == [False, False, False, True]
    assert int(masks["b"].sum()) == 4


def test_averaged_scores_then_masks_are_what_a_server_does() -> None:
    clients = [
        {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.zeros(2)},
        {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0])},
    ]
    average = average_scores(clients, [30, 10])
    torch.testing.assert_close(average, {"a": torch.tensor([0.75, 0, 0]), "b": torch.tensor([0, 0.25])})
    assert {n: m.tolist() for n, m in masks_from_scores(average, 0.6).items()} == {
        "a": [True, False, False],
        "b": [False, True],
    }
    assert torch.equal(average_scores(clients)["a"], torch.tensor([0.5, 0, 0]))


ONE = {"a": torch.rand(4), "b": torch.rand(6)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks_from_scores({}, 0.5), "scores: got none"),
        (lambda: masks_from_scores(ONE, 1.0), "sparsity: got 1.0"),
        (lambda: masks_from_scores(ONE, float("nan")), "sparsity: got nan"),
        (lambda: masks_from_scores(ONE, -0.1), "sparsity: got -0.1"),
        (lambda: masks_from_scores(ONE, 0.96, keep_layers_alive=False), "keeps none of 10 weights"),
        (lambda: masks_from_scores(ONE, 0.9), "keeps 1 of 10 weights, fewer than the 2 layers"),
        (lambda: masks_from_scores(ONE, 0.5, "model"), "scope: got 'model'"),
        (lambda: masks_from_scores(ONE, 0.5, "global", allocation="erk"), "scope: 'global' contradicts"),
        (lambda: masks_from_scores(ONE, 0.5, "layer", allocation="global"), "scope: 'layer' contradicts"),
        (lambda: masks_from_scores(ONE, 0.5, allocation="flops"), "allocation: got 'flops'"),
        (lambda: masks_from_scores(ONE, 0.5, allocation={"a": 5}), "layers b are missing or unknown"),
        (
            lambda: masks_from_scores(ONE, 0.5, allocation={"a": 5, "b": 0}),
            "a gets 5 weights, expected 1 to 4",
        ),
        (
            lambda: masks_from_scores(ONE, 0.5, allocation={"a": 1, "b": 1}),
            "add up to 2, the sparsity asks for 5",
        ),
        (
            lambda: masks_from_scores({"a": torch.tensor([1.0, float("nan")])}, 0.5),
            "scores: a has 1 of 2 scores",
        ),
        (lambda: masks_from_scores({"a": torch.tensor([1, 2])}, 0.5), "scores: a is torch.int64"),
        (lambda: masks_from_scores({"a": torch.rand(0)}, 0.5), "scores: a is torch.float32"),
        (lambda: masks_from_scores(ONE, 0.5, within={"a": torch.ones(4) > 0}), "within: b is nothing"),
        (
            lambda: masks_from_scores(ONE, 0.5, within={n: s > 2 for n, s in ONE.items()}),
            "within: a has no weights",
        ),
        (
            lambda: masks_from_scores(ONE, 0.5, within={n: s >= s.max() for n, s in ONE.items()}),
            "all layers together has 2 weights left, 5 were asked for",
        ),
        (lambda: average_scores([]), "clients: got no scores"),
        (lambda: average_scores([ONE], [1, 2]), "weights: got 2, expected one for each of 1"),
        (lambda: average_scores([ONE], [0.0]), "not all 0"),
        (lambda: average_scores([ONE], [float("inf")]), "expected finite numbers"),
        (lambda: average_scores([ONE, {"a": ONE["a"]}]), "scores 1 have other layers"),
        (lambda: average_scores([ONE, {**ONE, "b": torch.full((6,), math.nan)}]), "client 1, b has 6 of 6"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
