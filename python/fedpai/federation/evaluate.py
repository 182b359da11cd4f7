# SPDX-License-Identifier: Apache-2.0
"""Accuracy on held-out images, for the global model and for a client's own class mix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedpai.data import Dataset
from fedpai.federation.bound import BoundModel, ModelPool
from fedpai.federation.seeds import generator

EVAL_BATCH = 200


@dataclass(frozen=True)
class Score:
    """Result of one evaluation.

    Attributes:
        accuracy, loss: over all evaluated images.
        correct, total: per class, int64.
    """

    accuracy: float
    loss: float
    correct: np.ndarray
    total: np.ndarray

    def under(self, histogram: np.ndarray) -> float:
        """Accuracy on a population with another class mix: sum_c p(c) * accuracy on class c.

        Args:
            histogram: how many examples of each class the population has. Classes that were not evaluated
                are left out and the rest is rescaled.
        """
        share = np.where(self.total > 0, histogram, 0).astype(np.float64)
        if share.sum() == 0:
            return math.nan
        per_class = self.correct / np.maximum(self.total, 1)
        return float((share * per_class).sum() / share.sum())


class Evaluator:
    """Evaluates models on a fixed, seeded subset of test images.

    Args:
        data: the data set, whose test split is used.
        limit: how many of its images to use (None: all).
        seed: of the choice.
    """

    def __init__(self, data: Dataset, limit: int | None, seed: int) -> None:
        count = len(data.test_labels)
        chosen = np.arange(count)
        if limit is not None and limit < count:
            chosen = np.sort(generator(seed, "evaluation images").choice(count, limit, replace=False))
        self.indices = chosen
        self.classes = data.num_classes
        self._data = data

    @torch.no_grad()
    def score(self, bound: BoundModel, pool: ModelPool) -> Score:
        """Runs the model in eval mode over the subset."""
        model = bound.model.eval()
        correct = np.zeros(self.classes, np.int64)
        total = np.zeros(self.classes, np.int64)
        loss = 0.0
        for start in range(0, self.indices.size, EVAL_BATCH):
            x, y = self._data.batch(self.indices[start : start + EVAL_BATCH], split="test")
            logits = model(pool.images(bound, x))
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            hit = (logits.argmax(1) == y).numpy()
            classes = y.numpy()
            correct += np.bincount(classes[hit], minlength=self.classes)
            total += np.bincount(classes, minlength=self.classes)
        images = int(total.sum())
        return Score(float(correct.sum()) / images, loss / images, correct, total)
