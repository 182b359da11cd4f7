# SPDX-License-Identifier: Apache-2.0
"""One data set in memory: uint8 images, labels, and the numbers that normalise them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Split = Literal["train", "test"]
Indices = torch.Tensor | npt.NDArray[np.integer] | Sequence[int]


class DataError(ValueError):
    """A data folder or file that is missing, incomplete, damaged or of another kind."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images with labels.

    Attributes:
        name: what was loaded.
        train_images: uint8 (N, C, H, W), as stored: unnormalised.
        train_labels: int64 (N,), each in ``range(num_classes)``.
        test_images, test_labels: the same for the test split.
        num_classes: how many labels there may be.
        mean, std: one number a channel, of the training images scaled to [0, 1], padding included.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_arrays(
        cls,
        name: str,
        train: tuple[torch.Tensor, torch.Tensor],
        test: tuple[torch.Tensor, torch.Tensor],
        num_classes: int,
    ) -> Dataset:
        """Check two splits of (images, labels) and measure mean and std of the training images.

        Raises:
            DataError: images that are not uint8 (N, C, H, W), splits of different shapes, an empty split, a
                number of labels that is not the number of images, a label outside ``range(num_classes)``.
        """
        checked = []
        for split, (images, labels) in (("training", train), ("test", test)):
            if images.dtype != torch.uint8 or images.dim() != 4 or len(images) == 0:
                raise DataError(
                    f"{name}: {split} images are {images.dtype} {tuple(images.shape)}, "
                    "expected at least one image as torch.uint8 (N, C, H, W)"
                )
            if labels.shape != images.shape[:1]:
                raise DataError(f"{name}: {len(images)} {split} images but {len(labels)} labels")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise DataError(
                    f"{name}: {split} labels run from {low} to {high}, expected 0 to {num_classes - 1}"
                )
            checked.append((images.contiguous(), labels.to(torch.int64)))
        (train_images, train_labels), (test_images, test_labels) = checked
        if train_images.shape[1:] != test_images.shape[1:]:
            raise DataError(
                f"{name}: training images are {tuple(train_images.shape[1:])}, "
                f"test images {tuple(test_images.shape[1:])}"
            )
        mean, std = _moments(train_images)
        return cls(name, train_images, train_labels, test_images, test_labels, num_classes, mean, std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        """The number of training images."""
        return len(self.train_images)

    def batch(self, indices: Indices, *, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images and labels at ``indices``, in that order.

        Args:
            indices: integers in ``range(number of images in the split)``; repeats are allowed.
            split: ``"train"`` or ``"test"``; both are normalised with the training images' mean and std.

        Returns:
            float32 (len(indices), C, H, W) and int64 (len(indices),).

        Raises:
            ValueError: an unknown split, indices that are not integers or not one-dimensional.
            IndexError: an index out of range; negative ones do not wrap around.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
        images, labels = (
            (self.train_images, self.train_labels)
            if split == "train"
            else (self.test_images, self.test_labels)
        )
        index = as_indices(indices, len(images))
        scale = torch.tensor([1 / (255 * s) for s in self.std]).view(-1, 1, 1)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)]).view(-1, 1, 1)
        return images[index].float().mul_(scale).sub_(shift), labels[index]


def as_indices(indices: Indices, length: int) -> torch.Tensor:
    """``indices`` as a checked int64 tensor (n,) of positions below ``length``."""
    index = torch.as_tensor(indices)
    if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.dtype == torch.bool)):
        raise ValueError(f"indices: got {index.dtype} {tuple(index.shape)}, expected integers of shape (n,)")
    index = index.to(torch.int64)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= length):
        raise IndexError(
            f"indices: run from {int(index.min())} to {int(index.max())}, expected 0 to {length - 1}"
        )
    return index


def _moments(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over [0, 1], from a histogram, hence exact in any order."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        mean = (counts @ levels / counts.sum()).item()
        variance = (counts @ (levels - mean).square() / counts.sum()).item()
        means.append(mean)
        # A constant channel has nothing to scale.
        stds.append(variance**0.5 if variance > 0 else 1.0)
    return tuple(means), tuple(stds)
