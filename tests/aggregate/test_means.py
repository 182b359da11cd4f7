# SPDX-License-Identifier: Apache-2.0
"""Means of clients' vectors against their formulas in float64 numpy, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpai_kernels import aggregate

anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 63, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 20_001]


def mean_by_hand(vectors: list[np.ndarray], weights: list[float]) -> np.ndarray:
    total = np.zeros(vectors[0].size)
    for vector, weight in zip(vectors, weights, strict=True):
        total += weight * vector.astype(np.float64)
    return (total / sum(weights)).astype(np.float32)


def masked_by_hand(
    old: np.ndarray, vectors: list[np.ndarray], at: list[np.ndarray], weights: list[float]
) -> np.ndarray:
    total, weight = np.zeros(old.size), np.zeros(old.size)
    for vector, places, n in zip(vectors, at, weights, strict=True):
        total[places] += n * vector.astype(np.float64)
        weight[places] += n
    covered = weight > 0
    merged = old.copy()
    merged[covered] = (total[covered] / weight[covered]).astype(np.float32)
    return merged


def draw_clients(
    seed: int, size: int, clients: int, share: float
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[float]]:
    """An old vector, and each client's values, positions and weight."""
    rng = np.random.default_rng(seed)
    old = rng.standard_normal(size).astype(np.float32)
    at = [np.flatnonzero(rng.random(size) < share).astype(np.int32) for _ in range(clients)]
    vectors = [rng.standard_normal(places.size).astype(np.float32) for places in at]
    return old, vectors, at, [float(n) for n in rng.integers(1, 1000, clients)]


@pytest.mark.parametrize("clients", [1, 3, 4, 8, 19])
@pytest.mark.parametrize("size", LENGTHS)
def test_weighted_mean(isa: str, size: int, clients: int) -> None:
    _, vectors, _, weights = draw_clients(size, size, clients, 1.0)
    merged = aggregate.weighted_mean(vectors, weights)
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, mean_by_hand(vectors, weights))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", LENGTHS)
def test_masked_mean(isa: str, size: int, share: float) -> None:
    old, vectors, at, weights = draw_clients(size, size, 5, share)
    merged = aggregate.masked_mean(old, vectors, at, weights)
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, masked_by_hand(old, vectors, at, weights))


@anything
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 300),
    clients=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    compensated=st.booleans(),
)
def test_any_clients(isa: str, seed: int, size: int, clients: int, share: float, compensated: bool) -> None:
    old, vectors, at, weights = draw_clients(seed, size, clients, share)
    masked = aggregate.masked_mean(old, vectors, at, weights, compensated=compensated)
    expected = masked_by_hand(old, vectors, at, weights)
    rounding = 0 if not compensated else np.finfo(np.float32).eps
    np.testing.assert_allclose(masked, expected, rtol=rounding, atol=0)
    full = [np.full(size, vector.size, np.float32) for vector in vectors]
    same = aggregate.masked_mean(old, full, [np.arange(size)] * clients, weights, compensated=compensated)
    np.testing.assert_array_equal(same, aggregate.weighted_mean(full, weights, compensated=compensated))


@anything
@given(
    terms=st.lists(
        st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(1, 2**28)), min_size=1, max_size=9
    )
)
def test_compensated_sums_are_exact(isa: str, terms: list[tuple[float, int]]) -> None:
    """Terms that cancel leave what is left of them; the exact mean is that of rational numbers."""
    terms = [*terms, *((-value, n) for value, n in terms), (3.0, 1)]
    vectors = [np.array([value], np.float32) for value, _ in terms]
    weights = [n for _, n in terms]
    exact = sum(n * Fraction(float(v[0])) for v, n in zip(vectors, weights, strict=True)) / sum(weights)
    largest = max(abs(float(v[0])) * n for v, n in zip(vectors, weights, strict=True))
    merged = float(aggregate.weighted_mean(vectors, weights, compensated=True)[0])
    bound = 2.0**-23 * abs(float(exact)) + len(terms) ** 2 * 2.0**-104 * largest / sum(weights)
    assert abs(merged - float(exact)) <= bound


@pytest.mark.parametrize("compensated", [False, True])
def test_threads_and_instruction_sets_do_not_change_bits(
    set_threads: Callable[[int], None], isa: str, compensated: bool
) -> None:
    """Weights that are no whole numbers, so products are rounded as well."""
    old, vectors, at, _ = draw_clients(0, 70_001, 11, 0.3)
    weights = [0.1 + 0.7 * k for k in range(11)]
    full = [np.resize(vector, old.size) for vector in vectors]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(
            (
                aggregate.masked_mean(old, vectors, at, weights, compensated=compensated),
                aggregate.weighted_mean(full, weights, compensated=compensated),
            )
        )
    if not compensated:  # numpy's additions are those of any instruction set
        results.append((masked_by_hand(old, vectors, at, weights), mean_by_hand(full, weights)))
    for masked, mean in results[1:]:
        np.testing.assert_array_equal(masked, results[0][0])
        np.testing.assert_array_equal(mean, results[0][1])


def test_inputs_are_left_alone() -> None:
    old, vectors, at, weights = draw_clients(1, 500, 4, 0.5)
    before = [array.copy() for array in (old, *vectors, *at)]
    aggregate.masked_mean(old, vectors, at, weights)
    aggregate.weighted_mean([old, old], [1, 2])
    for array, copy in zip((old, *vectors, *at), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_arrays_of_any_kind() -> None:
    """Tensors, read-only and misaligned memory, strides, int64 positions: all the same numbers."""
    old, vectors, at, weights = draw_clients(2, 100, 3, 0.5)
    expected = aggregate.masked_mean(old, vectors, at, weights)
    tensors = [torch.from_numpy(vector) for vector in vectors]
    merged = aggregate.masked_mean(torch.from_numpy(old), tensors, [torch.from_numpy(a) for a in at], weights)
    assert isinstance(merged, torch.Tensor)
    np.testing.assert_array_equal(merged.numpy(), expected)
    odd = [np.frombuffer(b"x" + vector.tobytes(), np.uint8)[1:].view(np.float32) for vector in vectors]
    wide = [np.repeat(places.astype(np.int64), 2)[::2] for places in at]
    np.testing.assert_array_equal(aggregate.masked_mean(old, odd, wide, weights), expected)
    parameter = torch.nn.Parameter(torch.ones(3))
    assert aggregate.weighted_mean([parameter, parameter], [1, 2]).tolist() == [1, 1, 1]


def test_what_is_not_finite_stays() -> None:
    old = np.array([1, np.nan, 2], np.float32)
    merged = aggregate.masked_mean(old, [np.array([np.inf], np.float32)], [np.array([2])], [1])
    assert merged.tolist()[0] == 1
    assert np.isnan(merged[1])
    assert np.isinf(merged[2])


ONE = np.ones(2, np.float32)
AT = np.arange(2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: aggregate.weighted_mean([], []), ValueError, "vectors: got none"),
        (lambda: aggregate.weighted_mean([ONE], [1, 2]), ValueError, "weights: got 2 for 1 vectors"),
        (lambda: aggregate.weighted_mean([ONE, ONE], [1, 0]), ValueError, r"weights\[1\]: got 0, expected"),
        (lambda: aggregate.weighted_mean([ONE], [float("nan")]), ValueError, r"weights\[0\]: got nan"),
        (lambda: aggregate.weighted_mean([ONE, ONE[:1]], [1, 1]), ValueError, r"vectors\[1\]: 1 values and the 2"),
        (lambda: aggregate.weighted_mean([ONE.astype(float)], [1]), TypeError, r"vectors\[0\]: got float64"),
        (lambda: aggregate.weighted_mean([[1.0]], [1]), TypeError, r"vectors\[0\]: got list, expected an array"),
        (lambda: aggregate.weighted_mean([ONE[:, None]], [1]), ValueError, r"vectors\[0\]: got 2 dimensions"),
        (lambda: aggregate.weighted_mean([torch.ones(2, device="meta")], [1]), ValueError, "tensor on meta"),
        (lambda: aggregate.masked_mean(ONE, [ONE], [], [1]), ValueError, "positions: got 0 arrays for 1 vectors"),
        (lambda: aggregate.masked_mean(ONE, [ONE], [AT[:1]], [1]), ValueError, r"positions\[0\]: got 1 for the 2"),
        (lambda: aggregate.masked_mean(ONE, [ONE], [AT + 0.0], [1]), TypeError, r"positions\[0\]: got float64"),
        (lambda: aggregate.masked_mean(ONE, [ONE], [AT + 1], [1]), ValueError, r"expected positions in \[0, 2\)"),
        (lambda: aggregate.masked_mean(ONE, [ONE], [AT - 1], [1]), ValueError, r"got -1 to 0"),
        (lambda: aggregate.masked_mean(ONE[:0], [ONE], [AT], [1]), ValueError, r"expected positions in \[0, 0\)"),
        (lambda: aggregate.masked_mean(AT, [ONE], [AT], [1]), TypeError, "old: got int64, expected float32"),
    ],
)
def test_what_cannot_be_merged(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("wrong", [[1, 0], [1, 1], [0, 3], [-1, 0], [-(2**31), 2**31 - 1]])
def test_positions_out_of_order(wrong: list[int], dtype: type) -> None:
    old = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"positions\[1\]: expected (ascending )?positions .*in \[0, 3\)"):
        aggregate.masked_mean(old, [ONE, ONE, ONE], [AT, np.array(wrong, dtype), AT], [1, 1, 1])
