# SPDX-License-Identifier: Apache-2.0
"""Dividing training images among clients. Argument names follow flwr-datasets.

Every function returns one ascending int64 tensor of positions a client; each position is in exactly one of
them. The same arguments give the same partition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# Dirichlet draws before the minimum size is called out of reach.
MAX_DRAWS = 1000
_Ints = npt.NDArray[np.int64]


def partition_iid(
    labels: torch.Tensor | Sequence[int], num_partitions: int, seed: int = 0
) -> list[torch.Tensor]:
    """Equal random parts; sizes differ by at most one.

    Raises:
        ValueError: labels that are not a non-empty list of integers, or fewer of them than parts.
    """
    values = _labels(labels, num_partitions)
    order = np.random.default_rng(seed).permutation(len(values))
    return _finished(np.array_split(order, num_partitions))


def partition_dirichlet(
    labels: torch.Tensor | Sequence[int],
    num_partitions: int,
    alpha: float,
    min_partition_size: int = 10,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Each class divided by its own draw from a symmetric Dirichlet distribution (Yurochkin et al., arXiv
    1905.12022).

    Args:
        labels: one integer an image.
        num_partitions: number of clients.
        alpha: concentration; small is uneven, large approaches IID.
        min_partition_size: draw again until every client has this many images.
        seed: of the draws.

    Raises:
        ValueError: an argument out of range, or no draw of ``MAX_DRAWS`` that reaches ``min_partition_size``.
    """
    values = _labels(labels, num_partitions)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: got {alpha}, expected a positive number")
    if min_partition_size < 0:
        raise ValueError(f"min_partition_size: got {min_partition_size}, expected at least 0")
    if num_partitions * min_partition_size > len(values):
        raise ValueError(
            f"min_partition_size: {num_partitions} partitions of at least {min_partition_size} need "
            f"{num_partitions * min_partition_size} images, there are {len(values)}"
        )
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(values, return_counts=True)
    best = -1
    for _ in range(MAX_DRAWS):
        cuts = _dirichlet_cuts(counts, num_partitions, alpha, rng)
        smallest = int(np.diff(cuts, axis=1).sum(axis=0).min())
        best = max(best, smallest)
        if smallest >= min_partition_size:
            break
    else:
        raise ValueError(
            f"min_partition_size: none of {MAX_DRAWS} draws with alpha {alpha} gave each of {num_partitions} "
            f"partitions {min_partition_size} images (best: {best}); raise alpha, or lower "
            "min_partition_size or num_partitions"
        )
    parts: list[list[_Ints]] = [[] for _ in range(num_partitions)]
    for label, cut in zip(classes, cuts, strict=True):
        members = rng.permutation(np.flatnonzero(values == label))
        for part, piece in zip(parts, np.split(members, cut[1:-1]), strict=True):
            part.append(piece)
    return _finished([np.concatenate(part) for part in parts])


def _dirichlet_cuts(counts: _Ints, num_partitions: int, alpha: float, rng: np.random.Generator) -> _Ints:
    """(classes, num_partitions + 1): where each class's shuffled images are cut."""
    shares = rng.dirichlet(np.full(num_partitions, alpha), size=len(counts))
    cuts = np.zeros((len(counts), num_partitions + 1), np.int64)
    cuts[:, 1:] = np.rint(np.cumsum(shares, axis=1) * counts[:, None])
    cuts[:, -1] = counts
    return np.minimum(cuts, counts[:, None])


def partition_shards(
    labels: torch.Tensor | Sequence[int],
    num_partitions: int,
    num_classes_per_partition: int = 2,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Every client gets images of exactly ``num_classes_per_partition`` classes.

    Classes are cut into shards, more for larger classes; each client is dealt shards of distinct classes. A
    class is divided equally among the clients that hold it.

    Raises:
        ValueError: an argument out of range, more classes a client than there are, too few places for every
            class to be held by somebody, or a class with fewer images than clients that must hold it.
    """
    values = _labels(labels, num_partitions)
    classes, counts = np.unique(values, return_counts=True)
    if not 1 <= num_classes_per_partition <= len(classes):
        raise ValueError(
            f"num_classes_per_partition: got {num_classes_per_partition}, expected 1 to {len(classes)}, "
            "the classes present"
        )
    places = num_partitions * num_classes_per_partition
    if places < len(classes):
        raise ValueError(
            f"num_classes_per_partition: {num_partitions} partitions of {num_classes_per_partition} classes "
            f"hold at most {places} of the {len(classes)} classes, and every image must go somewhere"
        )
    shards = _shard_counts(counts, places, num_partitions)
    rng = np.random.default_rng(seed)
    free = np.full(num_partitions, num_classes_per_partition)
    parts: list[list[_Ints]] = [[] for _ in range(num_partitions)]
    # Largest first, to the clients with most places left: always works out (Gale and Ryser).
    for which in np.lexsort((rng.random(len(classes)), -shards)):
        holders = np.lexsort((rng.random(num_partitions), -free))[: shards[which]]
        free[holders] -= 1
        members = rng.permutation(np.flatnonzero(values == classes[which]))
        for holder, piece in zip(holders, np.array_split(members, shards[which]), strict=True):
            parts[holder].append(piece)
    return _finished([np.concatenate(part) for part in parts])


def _shard_counts(counts: _Ints, places: int, num_partitions: int) -> _Ints:
    """How many clients hold each class: near-proportional to its images, 1 to ``num_partitions``, in total
    ``places``; each next place goes to the class whose shards are largest."""
    limit = np.minimum(counts, num_partitions)
    if limit.sum() < places:
        raise ValueError(
            f"num_partitions: the classes have too few images to fill {places} places with at least one each"
        )
    shards = np.ones(len(counts), np.int64)
    for _ in range(places - len(counts)):
        size = np.where(shards < limit, counts / shards, -1.0)
        shards[int(size.argmax())] += 1
    return shards


def _labels(labels: torch.Tensor | Sequence[int], num_partitions: int) -> _Ints:
    """Labels as an int64 array, checked together with the number of parts."""
    values = np.asarray(labels)
    if values.ndim != 1 or len(values) == 0 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"labels: got {values.dtype} {values.shape}, expected integers of shape (n,), n >= 1"
        )
    if not 1 <= num_partitions <= len(values):
        raise ValueError(
            f"num_partitions: got {num_partitions}, expected 1 to {len(values)}, the number of labels"
        )
    return values.astype(np.int64)


def _finished(parts: Sequence[_Ints]) -> list[torch.Tensor]:
    """Ascending int64 tensors."""
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]
