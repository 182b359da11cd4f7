# SPDX-License-Identifier: Apache-2.0
"""A hundred training steps, sparse against dense with masked weights, from the same start.

Training is chaotic: a difference in the last bit grows with every step, between any two programs that sum in
another order. So "the same" can only mean: apart by no more than two dense runs are. Dense torch is run
plain, channels_last, and with the images of every batch in reverse, which all sum in other orders; their
distance is the yardstick, measured here and not chosen. What drives runs apart are single ReLUs and maxima
that fall on the other side by the last bit, so a distance is a draw of a random quantity that spreads over an
order of magnitude: hence the largest distance between dense runs against the sparse run's to the nearest of
them, a factor, and a floor. That cannot see a small error in a gradient. In float64 such accidents do not
happen within a hundred steps, and the tolerance is tight.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpai import models
from fedpai.data import synthetic
from fedpai_kernels import sparsify
from fedpai_kernels.nn import MaskedConv2d, SparseConv2d

STEPS = 100
BATCH = 16
IMAGE = 16
FACTOR = 3.0
LOSS_FLOOR = 1e-5
WEIGHT_FLOOR = 1e-6
# A hundred steps end about 1e-14 apart; the smallest wrong gradient would show above this.
DOUBLE_TOLERANCE = 1e-10


class Start(NamedTuple):
    dense: nn.Module
    masks: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]


class Distance(NamedTuple):
    losses: float
    weights: float


class Run(NamedTuple):
    losses: Tensor
    weights: Tensor


def start(name: str, dtype: torch.dtype = torch.float32) -> Start:
    """A network with zeros outside of its masks, and the batches of all steps."""
    model = models.create(name, width=0.25, image_size=IMAGE, in_channels=1, seed=1).to(dtype)
    generator = torch.Generator().manual_seed(2)
    masks: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        # The first layer is nearly dense, as under global pruning, and keeps its dense kernel.
        density = 0.9 if not masks else 0.1 + 0.2 * torch.rand((), generator=generator).item()
        masks[module_name] = torch.rand(module.weight.shape, generator=generator) < density
        with torch.no_grad():
            module.weight.mul_(masks[module_name])
    data = synthetic(in_channels=1, image_size=IMAGE, train_size=STEPS * BATCH, test_size=10, seed=3)
    images = data.train_images.to(dtype) / 255
    labels = data.train_labels
    return Start(model, masks, list(zip(images.split(BATCH), labels.split(BATCH), strict=True)))


def train(model: nn.Module, begin: Start, masked: bool, change: Callable[[Tensor], Tensor] = lambda x: x) -> Run:
    """SGD as in the benchmarks. `masked` zeroes the gradients outside of the masks, so that weights stay there."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    losses = []
    for images, labels in begin.batches:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(change(images)), labels)
        loss.backward()
        if masked:
            for name, mask in begin.masks.items():
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                assert weight.grad is not None
                weight.grad.mul_(mask)
        optimiser.step()
        losses.append(loss.detach())
    state = model.state_dict()
    return Run(torch.stack(losses), torch.cat([state[name].flatten() for name in begin.dense.state_dict()]))


def apart(a: Run, b: Run) -> Distance:
    """Root mean square difference of the losses of all steps, and of the final weights and statistics."""
    losses, weights = ((p.double() - q.double()).square().mean().sqrt().item() for p, q in zip(a, b, strict=True))
    return Distance(losses, weights)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def dense_runs(begin: Start) -> dict[str, Run]:
    """The same dense training by programs that sum in other orders."""
    plain = train(copy.deepcopy(begin.dense), begin, masked=True)
    moved = copy.deepcopy(begin.dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = train(moved, begin, masked=True, change=channels_last)
    reversed_batches = begin._replace(batches=[(x.flip(0), y.flip(0)) for x, y in begin.batches])
    third = train(copy.deepcopy(begin.dense), reversed_batches, masked=True)
    return {"contiguous": plain, "channels_last": other, "batches reversed": third}


NETWORKS = ["conv4", pytest.param("resnet18", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)


@pytest.mark.usefixtures("dense_from_eight_tenths")
@pytest.mark.parametrize("name", NETWORKS)
def test_hundred_steps_in_single_part_no_further_than_dense_runs_do(name: str) -> None:
    begin = start(name)
    sparse = sparsify(begin.dense, begin.masks, compact=False)
    kinds = {type(module) for module in sparse.modules()}
    assert SparseConv2d in kinds
    assert MaskedConv2d in kinds

    dense = dense_runs(begin)
    ours = train(sparse, begin, masked=False)
    assert ours.losses[-10:].mean() < ours.losses[:10].mean(), "nothing was learned, so nothing was compared"
    between = [apart(a, b) for a, b in itertools.combinations(dense.values(), 2)]
    nearest = [apart(ours, run) for run in dense.values()]
    for what, floor, yardsticks, distances in (
        ("losses", LOSS_FLOOR, [d.losses for d in between], [d.losses for d in nearest]),
        ("weights", WEIGHT_FLOOR, [d.weights for d in between], [d.weights for d in nearest]),
    ):
        assert min(distances) <= FACTOR * max(yardsticks) + floor, (
            f"{what}: dense runs are {yardsticks} apart from each other, the sparse one {distances} from them"
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_hundred_steps_in_double_are_the_same(name: str) -> None:
    begin = start(name, torch.float64)
    sparse = sparsify(begin.dense, begin.masks, compact=False)
    dense = copy.deepcopy(begin.dense)
    expected = train(dense, begin, masked=True)
    ours = train(sparse, begin, masked=False)
    distance = apart(ours, expected)
    assert distance.losses < DOUBLE_TOLERANCE
    assert distance.weights < DOUBLE_TOLERANCE
    state = sparse.state_dict()
    for layer, mask in begin.masks.items():
        assert (state[f"{layer}.weight"][~mask] == 0).all()
    images = begin.batches[0][0]
    torch.testing.assert_close(sparse.eval()(images), dense.eval()(images), rtol=1e-8, atol=1e-8)
