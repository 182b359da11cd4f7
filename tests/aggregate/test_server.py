# SPDX-License-Identifier: Apache-2.0
"""Votes about masks, and the server's optimisers, against their formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpai_kernels import aggregate

anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(seed=st.integers(0, 2**32), size=st.integers(0, 1100), clients=st.integers(1, 20), data=st.data())
def test_majority(isa: str, seed: int, size: int, clients: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    flags = rng.random((clients, 8 * size)) < rng.random()
    threshold = data.draw(st.integers(1, clients))
    kept = aggregate.majority(list(np.packbits(flags, axis=1)), threshold)
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(np.unpackbits(kept).astype(bool), flags.sum(0) >= threshold)


@pytest.mark.parametrize("clients", [127, 128, 129, 1000])
def test_majority_of_many(isa: str, set_threads: Callable[[int], None], clients: int) -> None:
    set_threads(2)
    flags = np.random.default_rng(clients).random((clients, 8 * 1200)) < 0.5
    bitmaps = [torch.from_numpy(bits) for bits in np.packbits(flags, axis=1)]
    kept = aggregate.majority(bitmaps, clients // 2)
    assert isinstance(kept, torch.Tensor)
    np.testing.assert_array_equal(np.unpackbits(kept.numpy()).astype(bool), flags.sum(0) >= clients // 2)


@pytest.mark.parametrize(
    ("bitmaps", "threshold", "error", "text"),
    [
        ([], 1, ValueError, "bitmaps: got none"),
        ([np.zeros(2, np.uint8)], 0, ValueError, "threshold: got 0, expected 1 to 1"),
        ([np.zeros(2, np.uint8)], 2, ValueError, "threshold: got 2, expected 1 to 1"),
        ([np.zeros(2, np.uint8), np.zeros(3, np.uint8)], 1, ValueError, r"bitmaps\[1\]: got 3 bytes, expected the 2"),
        ([np.zeros(2, bool)], 1, TypeError, r"bitmaps\[0\]: got bool, expected uint8"),
    ],
)
def test_votes_that_cannot_be(bitmaps: list, threshold: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        aggregate.majority(bitmaps, threshold)


def step_by_hand(
    rule: str, old: np.ndarray, merged: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, beta1: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Algorithm 2 of Reddi et al., and FedAvgM, in float64: the new model, m and v."""
    old, merged, m, v = (array.astype(np.float64) for array in (old, merged, m, v))
    delta = merged - old
    if rule == "avgm":
        m = beta1 * m + delta
        return old + lr * m, m, v
    m = beta1 * m + (1 - beta1) * delta
    if rule == "adam":
        v = 0.99 * v + 0.01 * delta**2
    else:
        v = v - 0.01 * delta**2 * np.sign(v - delta**2)
    return old + lr * m / (np.sqrt(v) + 1e-3), m, v


def sizes_of_what_is_added(
    rule: str, old: np.ndarray, merged: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, beta1: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with absolute values: what roundings are relative to where terms cancel."""
    _, _, new_v = step_by_hand(rule, old, merged, m, v, lr, beta1)
    old, delta, m, v = (np.abs(array.astype(np.float64)) for array in (old, merged - old, m, v))
    if rule == "avgm":
        m = beta1 * m + delta
        return old + lr * m, m, v
    m = beta1 * m + (1 - beta1) * delta
    return old + lr * m / (np.sqrt(new_v) + 1e-3), m, v + 0.01 * delta**2


@pytest.mark.parametrize("rule", aggregate.RULES)
@anything
@given(seed=st.integers(0, 2**32), size=st.integers(0, 70), scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_server_step(isa: str, rule: str, seed: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    old, merged, m, v = (scale * rng.standard_normal(size).astype(np.float32) for _ in range(4))
    v = np.abs(v) ** 2
    expected = step_by_hand(rule, old, merged, m, v, 0.3, 0.9)
    added = sizes_of_what_is_added(rule, old, merged, m, v, 0.3, 0.9)
    state = {"v": v} if rule != "avgm" else {}
    new = aggregate.server_step(rule, old, merged, m, **state, lr=0.3, beta1=0.9)
    for got, wanted, sizes in zip((new, m, v), expected, added, strict=True):
        assert got.dtype == np.float32
        assert (np.abs(got - wanted) <= 2e-6 * sizes).all(), np.max(np.abs(got - wanted) / sizes)


def test_yogi_keeps_a_square_that_is_met() -> None:
    """sign(0) is 0."""
    v = np.array([4.0], np.float32)
    zero = np.zeros(1, np.float32)
    aggregate.server_step("yogi", zero, zero + 2, zero.copy(), v, lr=1.0, beta1=0.9)
    assert v.tolist() == [4.0]


@pytest.mark.parametrize("rule", aggregate.RULES)
def test_threads_and_instruction_sets_do_not_change_bits(
    set_threads: Callable[[int], None], isa: str, rule: str
) -> None:
    rng = np.random.default_rng(3)
    old, merged, m, v = (rng.standard_normal(70_001).astype(np.float32) for _ in range(4))
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        state = (m.copy(),) if rule == "avgm" else (m.copy(), np.abs(v))
        new = aggregate.server_step(rule, old, merged, *state, lr=0.3, beta1=0.9)
        results.append([new, *state])
    f32 = np.float32
    delta = merged - old
    mean = f32(0.9) * m + (delta if rule == "avgm" else f32(1 - 0.9) * delta)
    results.append([results[0][0], mean, *results[0][2:]])
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_tensors_are_changed_in_place() -> None:
    m = torch.zeros(3)
    new = aggregate.server_step("avgm", torch.zeros(3), torch.ones(3), m, lr=2.0, beta1=0.5)
    assert isinstance(new, torch.Tensor)
    assert new.tolist() == [2, 2, 2]
    assert m.tolist() == [1, 1, 1]


def test_state_shares_no_memory() -> None:
    both = np.ones(7, np.float32)
    with pytest.raises(ValueError, match="must share no memory with"):
        aggregate.server_step("adam", vector(4), vector(4), both[:4], both[3:], lr=1.0, beta1=0.9)
    with pytest.raises(ValueError, match=r"m: .*must share no memory with merged"):
        aggregate.server_step("avgm", vector(7), both, both, lr=1.0, beta1=0.9)
    halves = both[:3], both[3:6]  # side by side is no overlap
    aggregate.server_step("yogi", vector(3), vector(3), *halves, lr=1.0, beta1=0.9)


def vector(size: int = 2) -> np.ndarray:
    return np.ones(size, np.float32)


@pytest.mark.parametrize(
    ("rule", "m", "v", "factors", "error", "text"),
    [
        ("sgd", vector(), None, {}, ValueError, "rule: got 'sgd', expected one of avgm, adam, yogi"),
        ("avgm", vector(), vector(), {}, ValueError, "v: got one"),
        ("adam", vector(), None, {}, ValueError, "v: got none"),
        ("adam", vector(3), vector(), {}, ValueError, "m: got 3 values, expected the 2 of old"),
        ("adam", vector(4)[::2], vector(), {}, ValueError, "m: it is changed in place"),
        ("adam", vector(), vector().astype(float), {}, TypeError, "v: got float64"),
        ("adam", vector(), vector(), {"lr": 0.0}, ValueError, "lr: got 0.0"),
        ("adam", vector(), vector(), {"beta1": 1.0}, ValueError, "beta1: got 1.0, expected 0 <= beta1 < 1"),
        ("adam", vector(), vector(), {"beta2": -0.1}, ValueError, "beta2: got -0.1"),
        ("adam", vector(), vector(), {"tau": 0.0}, ValueError, "tau: got 0.0"),
    ],
)
def test_steps_that_cannot_be(
    rule: str, m: np.ndarray, v: np.ndarray | None, factors: dict, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        aggregate.server_step(rule, vector(), vector(), m, v, **{"lr": 1.0, "beta1": 0.9, **factors})
