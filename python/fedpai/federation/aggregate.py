# SPDX-License-Identifier: Apache-2.0
"""Server-side merging of what clients send back, over packed vectors only.

    shared mask      theta_j = sum_k n_k w_kj / sum_k n_k
    personal masks   theta_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj ;  nobody sent j: theta_j keeps its value
    votes            j is kept if at least so many clients keep it

`fedpai_kernels.aggregate` computes them in one pass. Every sum runs over the clients in the given order with float64
accumulators and is rounded once to float32, so the result depends on nothing but the inputs and their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpai.federation.layout import Floats, Ints, MaskSet, Places
from fedpai_kernels import aggregate


def weighted_mean(vectors: Sequence[Floats], examples: Sequence[int]) -> Floats:
    """Mean of equal-length float32 vectors, weighted by example counts.

    Raises:
        ValueError: no vectors, unequal lengths, or a weight below one.
    """
    _check(vectors, examples)
    return aggregate.weighted_mean(vectors, examples)


def masked_mean(
    old: Floats, vectors: Sequence[Floats], at: Sequence[Places | Ints], examples: Sequence[int]
) -> Floats:
    """Masked mean: vector k speaks about positions at[k] of the result, and about no other.

    Args:
        old: float32, the values that uncovered positions keep.
        vectors: float32, one a client, vectors[k].shape == at[k].shape.
        at: int32 or, more slowly, int64: ascending unique positions into `old`.
        examples: n_k.

    Returns:
        float32 of old's shape. Cost: O(sum of the vectors' lengths) plus one copy of `old`.

    Raises:
        ValueError: no vectors, lengths that do not fit, positions that cannot be, or a weight below one.
    """
    _check(vectors, examples)
    return aggregate.masked_mean(old, vectors, at, examples)


def majority(masks: Sequence[MaskSet], votes: int) -> MaskSet:
    """The weights that at least so many of the masks keep.

    Args:
        masks: of one layout, at least one.
        votes: 1 (the union) to the number of masks (the intersection).

    Raises:
        ValueError: no masks, or a number of votes that cannot be.
    """
    if not masks:
        raise ValueError("nothing to vote about: no client sent a mask")
    bitmaps = [np.frombuffer(mask.bits(), np.uint8) for mask in masks]
    return MaskSet.from_bits(masks[0].layout, aggregate.majority(bitmaps, votes).tobytes())


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
