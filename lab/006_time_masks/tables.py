# SPDX-License-Identifier: Apache-2.0
"""What masks cost at 98 %, by criterion and allocation, without training: the table of docs/methods/allocation.md.

    python lab/006_time_masks/tables.py      # some minutes, most of them SynFlow's; needs Fashion-MNIST
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpai import data, models, pruning
from fedpai.pruning import cost

SPARSITY = 0.98
# With counts fixed beforehand layers cost the same by any criterion, so one stands for all.
FORMS = [f"random@{name}" for name in ("uniform", "erk", "flops", "time:0.8", "time:1", "time", "time:1.5", "time:2")]
FORMS += [f"{criterion}@global" for criterion in ("random", "magnitude", "grasp", "snip", "synflow")]


def row(name: str, model: nn.Module, form: str, images: tuple[Tensor, Tensor]) -> str:
    """One line of the table."""
    criterion, _, allocation = form.partition("@")
    layers = pruning.prunable_layers(model)
    prices = cost.nanoseconds(model, layers)
    whole = sum(layer.weight.numel() * prices[n] for n, layer in layers.items())
    masks = pruning.prune(model, SPARSITY, criterion, allocation=allocation, data=images)
    kept = pruning.summary(masks, model)
    spent = sum(int(mask.sum()) * prices[n] for n, mask in masks.items())
    densities = (f"{kept.rows[i].density:.3f}" for i in (0, 1, -2, -1))
    return " | ".join(
        (
            f"| {name} | {form} | {kept.mac_share:.1%}",
            f"{spent / 1e6:.2f}",
            f"{spent / whole / kept.density:.2f}",
            *densities,
            "",
        )
    ).rstrip()


def main() -> None:
    torch.set_num_threads(1)
    dataset = data.load("fashion-mnist")
    images = data.balanced_batch(dataset, seed=0)
    for name in ("resnet18", "vgg19"):
        model = models.create(name, in_channels=1, seed=0)
        for form in FORMS:
            print(row(name, model, form, images), flush=True)


if __name__ == "__main__":
    main()
