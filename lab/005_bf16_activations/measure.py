# SPDX-License-Identifier: Apache-2.0
"""What keeping activations in bfloat16 does to gradients, and to accuracy.

    python lab/005_bf16_activations/measure.py gradients            # seconds
    python lab/005_bf16_activations/measure.py accuracy SEED STEPS  # 900 steps: about a minute with two threads
"""

from __future__ import annotations

import copy
import statistics
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai import data, models
from fedpai.pruning import prune

WIDTH, SPARSITY, BATCH, RATE = 0.25, 0.9, 64, 0.05
DTYPES = (None, torch.bfloat16)


def start(seed: int, dataset: data.Dataset) -> tuple[nn.Module, dict[str, Tensor]]:
    """A quarter of ResNet18's channels, and GraSP's masks."""
    network = models.create("resnet18", width=WIDTH, in_channels=1, seed=seed)
    return network, prune(network, SPARSITY, "grasp", data=data.balanced_batch(dataset, seed=seed), seed=seed)


def train(network: nn.Module, dataset: data.Dataset, seed: int, steps: int) -> None:
    """SGD whose rate falls to zero in a straight line."""
    optimiser = fk.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    draw, done = torch.Generator().manual_seed(seed), 0
    while done < steps:
        for images, labels in data.iterate_batches(dataset, None, BATCH, generator=draw, drop_last=True):
            optimiser.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimiser.step()
            schedule.step()
            done += 1
            if done == steps:
                break


def accuracy(network: nn.Module, dataset: data.Dataset) -> float:
    """Per cent of all test images."""
    network.eval()
    right = 0
    with torch.no_grad():
        for images, labels in data.iterate_batches(dataset, None, 500, split="test"):
            right += int((network(images).argmax(1) == labels).sum())
    return 100 * right / len(dataset.test_labels)


def gradient(
    network: nn.Module, dtype: torch.dtype | None, batch: tuple[Tensor, Tensor], fuse: bool = True
) -> dict[str, Tensor]:
    network = fk.sparsify(fk.densify_(copy.deepcopy(network)), fuse=fuse, activation_dtype=dtype).train()
    F.cross_entropy(network(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def gradients(dataset: data.Dataset) -> None:
    """Relative errors of the gradients of one batch, by kind of parameter, at the start and after some training; the
    distance to the gradients of another batch beside them."""
    network, masks = start(0, dataset)
    fk.sparsify_(network, masks)
    kinds = {nn.BatchNorm2d: {"weight": "norm, weight", "bias": "norm, bias"}}
    for steps in (0, 100):
        train(network, dataset, 0, steps)
        batches = [dataset.batch(torch.arange(i, i + BATCH)) for i in (0, BATCH)]
        exact, other = (gradient(network, None, batch) for batch in batches)
        rounded = gradient(network, torch.bfloat16, batches[0])
        apart = gradient(network, torch.bfloat16, batches[0], fuse=False)
        found: dict[str, list[list[float]]] = {}
        for name, g in exact.items():
            path, _, own = name.rpartition(".")
            module = network.get_submodule(path)
            by_name = next((v for kind, v in kinds.items() if isinstance(module, kind)), {})
            kind = by_name.get(own, f"{'linear' if 'Linear' in type(module).__name__ else 'convolution'}, {own}")
            found.setdefault(kind, []).append([float((h[name] - g).norm() / g.norm()) for h in (rounded, apart, other)])
        print(f"after {steps} steps, relative to the norm of the float32 gradient (median and largest over layers):")
        for kind, rows in found.items():
            fused, unfused, noise = zip(*rows, strict=True)
            text = (f"{statistics.median(e):.2g} {max(e):.2g}" for e in (fused, unfused, noise))
            print(f"  {kind}: bf16 {{}}; bf16 with fuse=False {{}}; another batch {{}}".format(*text))


def main() -> None:
    torch.set_num_threads(2)
    dataset = data.load("fashion-mnist")
    if sys.argv[1] == "gradients":
        gradients(dataset)
        return
    seed, steps = int(sys.argv[2]), int(sys.argv[3])
    for dtype in DTYPES:
        network, masks = start(seed, dataset)
        fk.sparsify_(network, masks, activation_dtype=dtype)
        train(network, dataset, seed, steps)
        print(f"seed {seed}, {steps} steps, {dtype}: {accuracy(network, dataset):.2f} %", flush=True)


if __name__ == "__main__":
    main()
