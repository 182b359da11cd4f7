# SPDX-License-Identifier: Apache-2.0
"""Merging against the formulas, written out weight by weight over dense tensors."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedpai.federation.aggregate import largest, majority, masked_mean, weighted_mean
from fedpai.federation.layout import Layout, MaskSet


def by_hand(old: np.ndarray, dense: list, masks: list, examples: list) -> np.ndarray:
    """theta_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj, one weight at a time in Python floats."""
    merged = []
    for j, value in enumerate(old):
        top = sum(n * float(w[j]) for w, m, n in zip(dense, masks, examples, strict=True) if m[j])
        bottom = sum(n for m, n in zip(masks, examples, strict=True) if m[j])
        merged.append(top / bottom if bottom else float(value))
    return np.array(merged, np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_masked_mean_is_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, clients = 200, 6
    old = rng.standard_normal(size).astype(np.float32)
    dense = [rng.standard_normal(size).astype(np.float32) for _ in range(clients)]
    masks = [rng.random(size) < 0.2 for _ in range(clients)]
    examples = [int(n) for n in rng.integers(1, 1000, clients)]
    at = [np.flatnonzero(mask) for mask in masks]
    merged = masked_mean(old, [w[i] for w, i in zip(dense, at, strict=True)], at, examples)
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, by_hand(old, dense, masks, examples))
    uncovered = ~np.logical_or.reduce(masks)
    assert uncovered.any()
    np.testing.assert_array_equal(merged[uncovered], old[uncovered])


def test_weighted_mean_is_the_formula_with_full_masks() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(50).astype(np.float32) for _ in range(4)]
    examples = [3, 1, 10, 6]
    everywhere = [np.ones(50, bool)] * 4
    merged = weighted_mean(vectors, examples)
    np.testing.assert_array_equal(merged, by_hand(vectors[0], vectors, everywhere, examples))
    at = [np.arange(50)] * 4
    np.testing.assert_array_equal(merged, masked_mean(np.zeros(50, np.float32), vectors, at, examples))


def test_inputs_are_left_alone() -> None:
    old = np.ones(3, np.float32)
    vectors = [np.full(2, 5, np.float32)]
    masked_mean(old, vectors, [np.array([0, 2])], [1])
    assert old.tolist() == [1, 1, 1]
    assert vectors[0].tolist() == [5, 5]


def test_large_values_do_not_swallow_small_ones() -> None:
    vectors = [np.array([v], np.float32) for v in (2.0**25, 1.0, -(2.0**25))]
    assert weighted_mean(vectors, [1, 1, 1])[0] == np.float32(1 / 3)


@pytest.mark.parametrize("bad", [0, -4])
def test_weights_below_one_are_refused(bad: int) -> None:
    vector = np.ones(2, np.float32)
    with pytest.raises(ValueError, match=f"at least 1, got {bad}"):
        weighted_mean([vector, vector], [1, bad])
    with pytest.raises(ValueError, match=f"at least 1, got {bad}"):
        masked_mean(vector, [vector], [np.arange(2)], [bad])


def test_nothing_to_merge_and_unequal_lengths() -> None:
    vector = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="no client sent"):
        weighted_mean([], [])
    with pytest.raises(ValueError, match="cannot be averaged"):
        weighted_mean([vector, np.ones(3, np.float32)], [1, 1])
    with pytest.raises(ValueError, match="positions"):
        masked_mean(vector, [vector], [np.arange(1)], [1])


def test_integer_buffers_take_the_largest() -> None:
    assert largest([np.array([3, 9]), np.array([5, 1])]).tolist() == [5, 9]


@pytest.mark.parametrize("votes", [1, 2, 5])
def test_majority_is_counted(votes: int) -> None:
    layout = Layout.of(nn.Sequential(nn.Linear(13, 7)))
    rng = np.random.default_rng(4)
    flags = rng.random((5, layout.weight_count)) < 0.5
    masks = [MaskSet.from_positions(layout, np.flatnonzero(own)) for own in flags]
    kept = majority(masks, votes)
    np.testing.assert_array_equal(kept.positions, np.flatnonzero(flags.sum(0) >= votes))


def test_nothing_to_vote_about() -> None:
    with pytest.raises(ValueError, match="no client sent a mask"):
        majority([], 1)
