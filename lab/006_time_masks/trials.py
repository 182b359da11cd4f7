# SPDX-License-Identifier: Apache-2.0
"""Which masks train best under a budget of time: short trainings of a narrow network, one JSON row each.

    python lab/006_time_masks/trials.py grasp@global grasp@time:1.25 grasp@ratio:1.25 --seeds 0,1 >> rows.jsonl

A form is criterion@allocation. Beside the allocations of the package, three that were tried and are not in it, each within
X times the kernels' time of uniform masks, as time:X is:

    lagrange:X   one ranking of score - v * price, with the least v >= 0 that suffices
    ratio:X      one ranking of score / price ** v, likewise
    near:X       the counts nearest to those of the criterion's own ranking: they maximise sum(own counts * log(counts))
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai import data, models, pruning
from fedpai.pruning import allocation, cost
from fedpai.pruning.masks import masks_from_counts

BATCH, RATE = 64, 0.1
Masks = dict[str, Tensor]


class Network:
    """A fresh network and what its layers' weights cost."""

    def __init__(self, name: str, width: float, sparsity: float, seed: int, dataset: data.Dataset) -> None:
        self.model = models.create(name, width=width, in_channels=1, seed=seed)
        self.sparsity, self.seed = sparsity, seed
        self.images = data.balanced_batch(dataset, seed=seed)
        layers = pruning.prunable_layers(self.model)
        self.sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        self.prices = cost.nanoseconds(self.model, layers)

    def masks(self, form: str) -> Masks:
        """Masks of a form."""
        criterion, _, how = form.partition("@")
        name, _, limit = how.partition(":")
        if name in allocation.NAMES:
            return pruning.prune(
                self.model, self.sparsity, criterion, allocation=how, data=self.images, seed=self.seed
            )
        scores = pruning.scores(self.model, criterion, data=self.images, seed=self.seed)
        if name == "near":
            return self._near(scores, float(limit))
        top = max(float(score.max()) for score in scores.values())
        least = min(self.prices.values())

        def lagrange(v: float) -> Masks:
            return {n: s.double() - v * top * self.prices[n] / least for n, s in scores.items()}

        def ratio(v: float) -> Masks:
            return {n: s.double() / self.prices[n] ** v for n, s in scores.items()}

        return self._least(lagrange if name == "lagrange" else ratio, float(limit))

    def time(self, masks: Masks) -> float:
        """Of the kernels, as a multiple of what uniform masks take, without what does not depend on the masks."""
        kept = sum(int(mask.sum()) for mask in masks.values())
        spent = sum(int(mask.sum()) * self.prices[name] for name, mask in masks.items())
        whole = sum(self.sizes[name] * price for name, price in self.prices.items())
        return spent / whole * sum(self.sizes.values()) / kept

    def _least(self, changed: Callable[[float], Masks], limit: float) -> Masks:
        low, high = 0.0, 8.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.time(pruning.masks_from_scores(changed(middle), self.sparsity)) > limit:
                low = middle
            else:
                high = middle
        return pruning.masks_from_scores(changed(high), self.sparsity)

    def _near(self, scores: Masks, limit: float) -> Masks:
        own = {n: int(m.sum()) for n, m in pruning.masks_from_scores(scores, self.sparsity).items()}
        kept, most = sum(own.values()), np.array(list(self.sizes.values()))
        found = allocation._within_time(
            np.array(list(own.values()), float),
            np.array(list(self.prices.values())),
            most,
            kept,
            np.ones_like(most),
            limit,
        )
        counts = allocation._rounded(found, most, kept)
        return masks_from_counts(scores, dict(zip(own, counts.tolist(), strict=True)))


def train(network: nn.Module, dataset: data.Dataset, seed: int, images: int, epochs: int) -> None:
    """SGD under one cycle of the rate, on the first images of a random order."""
    optimiser = fk.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    draw = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(dataset.train_labels), generator=draw)[:images]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, total_steps=epochs * (images // BATCH), pct_start=0.2
    )
    network.train()
    for _ in range(epochs):
        for x, y in data.iterate_batches(dataset, indices, BATCH, generator=draw, drop_last=True):
            optimiser.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimiser.step()
            schedule.step()


def accuracy(network: nn.Module, dataset: data.Dataset) -> float:
    """Per cent of all test images."""
    network.eval()
    right = 0
    with torch.no_grad():
        for x, y in data.iterate_batches(dataset, None, 500, split="test"):
            right += int((network(x).argmax(1) == y).sum())
    return 100 * right / len(dataset.test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("forms", nargs="+", help="criterion@allocation, or dense")
    add("--seeds", default="0", help="0,1,2")
    add("--model", default="resnet18")
    add("--width", type=float, default=0.25)
    add("--sparsity", type=float, default=0.98)
    add("--images", type=int, default=6000)
    add("--epochs", type=int, default=4)
    add("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dataset = data.load("fashion-mnist")
    setting = {key: getattr(arguments, key) for key in ("model", "width", "sparsity", "images", "epochs")}
    for seed in map(int, arguments.seeds.split(",")):
        for form in arguments.forms:
            net = Network(arguments.model, arguments.width, arguments.sparsity, seed, dataset)
            row = {**setting, "form": form, "seed": seed}
            if form != "dense":
                masks = net.masks(form)
                row["mac_share"] = round(pruning.summary(masks, net.model).mac_share, 4)
                row["time"] = round(net.time(masks), 3)
                row["densities"] = {n: round(float(m.float().mean()), 4) for n, m in masks.items()}
                fk.sparsify_(net.model, masks)
            train(net.model, dataset, seed, arguments.images, arguments.epochs)
            row["accuracy"] = round(accuracy(net.model, dataset), 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
