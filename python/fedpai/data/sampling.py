# SPDX-License-Identifier: Apache-2.0
"""Which images come when: epochs in shuffled batches, and small balanced batches for scoring."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedpai.data.dataset import Dataset, Indices, Split, as_indices


def iterate_batches(
    dataset: Dataset,
    indices: Indices | None = None,
    batch_size: int = 64,
    *,
    generator: torch.Generator | None = None,
    split: Split = "train",
    drop_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over ``indices`` in batches of :meth:`Dataset.batch`.

    Args:
        dataset: the images.
        indices: which images; ``None`` means the whole split.
        batch_size: images a batch; the last one may be smaller unless ``drop_last``.
        generator: draws the order; ``None`` keeps the order given.
        split: ``"train"`` or ``"test"``.
        drop_last: leave out an incomplete last batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    length = len(dataset.train_images if split == "train" else dataset.test_images)
    index = torch.arange(length) if indices is None else as_indices(indices, length)
    if generator is not None:
        index = index[torch.randperm(len(index), generator=generator)]
    return _batches(dataset, index, batch_size, split, drop_last)


def _batches(
    dataset: Dataset, index: torch.Tensor, batch_size: int, split: Split, drop_last: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The generator behind :func:`iterate_batches`, which itself checks its arguments when it is called."""
    for part in index.split(batch_size):
        if len(part) and not (drop_last and len(part) < batch_size):
            yield dataset.batch(part, split=split)


def balanced_batch(
    dataset: Dataset, indices: Indices | None = None, per_class: int = 10, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to ``per_class`` training images of every class that is present, in shuffled order.

    Takes whatever classes there are: a client that lacks a class, or has fewer images of it, gets a smaller
    batch and never waits for the missing ones. Shuffled, so that the two halves that GraSP makes are alike.

    Args:
        dataset: the images.
        indices: the client's training images; ``None`` means all.
        per_class: at most this many of each class.
        seed: decides which images, and their order.

    Returns:
        float32 (B, C, H, W) and int64 (B,), B at least 1.

    Raises:
        ValueError: no images, or ``per_class`` below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class: got {per_class}, expected at least 1")
    index = torch.arange(len(dataset)) if indices is None else as_indices(indices, len(dataset))
    if len(index) == 0:
        raise ValueError("indices: got none, expected at least one image to draw a batch from")
    generator = torch.Generator().manual_seed(seed)
    index = index[torch.randperm(len(index), generator=generator)]
    labels = dataset.train_labels[index]
    chosen = torch.cat([index[labels == label][:per_class] for label in labels.unique()])
    return dataset.batch(chosen[torch.randperm(len(chosen), generator=generator)])
