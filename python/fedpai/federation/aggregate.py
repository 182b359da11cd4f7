# SPDX-License-Identifier: Apache-2.0
"""Server-side merging of what clients send back, over packed vectors only.

    shared mask      theta_j = sum_k n_k w_kj / sum_k n_k
    personal masks   theta_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj ;  nobody sent j: theta_j keeps its value

Every sum runs over the clients in the given order with float64 accumulators and is rounded once to
float32, so the result depends on nothing but the inputs and their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpai.federation.layout import Floats, Ints


def weighted_mean(vectors: Sequence[Floats], examples: Sequence[int]) -> Floats:
    """Mean of equal-length float32 vectors, weighted by example counts.

    Raises:
        ValueError: no vectors, unequal lengths, or a weight below one.
    """
    _check(vectors, examples)
    total = np.zeros(vectors[0].shape, np.float64)
    term = np.empty_like(total)
    for vector, n in zip(vectors, examples, strict=True):
        if vector.shape != total.shape:
            raise ValueError(f"vectors of {vector.shape} and {total.shape} cannot be averaged")
        np.multiply(vector, float(n), out=term, dtype=np.float64)
        total += term
    total /= float(sum(examples))
    return total.astype(np.float32)


def masked_mean(
    old: Floats, vectors: Sequence[Floats], at: Sequence[Ints], examples: Sequence[int]
) -> Floats:
    """Masked mean: vector k speaks about positions at[k] of the result, and about no other.

    Args:
        old: float32, the values that uncovered positions keep.
        vectors: float32, one a client, vectors[k].shape == at[k].shape.
        at: int64, ascending unique positions into `old`.
        examples: n_k.

    Returns:
        float32 of old's shape. Cost: O(sum of the vectors' lengths) plus one copy of `old`.

    Raises:
        ValueError: no vectors, lengths that do not fit, or a weight below one.
    """
    _check(vectors, examples)
    total = np.zeros(old.shape, np.float64)
    weight = np.zeros(old.shape, np.float64)
    for vector, places, n in zip(vectors, at, examples, strict=True):
        if vector.shape != places.shape:
            raise ValueError(f"{vector.shape} values for {places.shape} positions")
        total[places] += np.multiply(vector, float(n), dtype=np.float64)
        weight[places] += float(n)
    merged = old.copy()
    covered = weight > 0
    np.divide(total, weight, out=total, where=covered)
    np.copyto(merged, total, where=covered, casting="same_kind")
    return merged


def largest(ints: Sequence[Ints]) -> Ints:
    """Integer buffers of the merged model: the largest value that any client reports.

    They count things (`num_batches_tracked`), and a mean of counts is no count.
    """
    return np.maximum.reduce([np.asarray(part, np.int64) for part in ints])


def _check(vectors: Sequence[Floats], examples: Sequence[int]) -> None:
    if not vectors:
        raise ValueError("nothing to merge: no client sent values")
    bad = [n for n in examples if n < 1]
    if bad:
        raise ValueError(f"example counts must be at least 1, got {bad[0]}")
