# SPDX-License-Identifier: Apache-2.0
"""Whole residual networks with fused sums: against unfused ones, and against dense-masked torch in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai.models.resnet import ResNet
from fedpai.models.vgg import VGG
from fedpai.models.wideresnet import WideResNet
from fedpai_kernels.nn.deferred import PendingNorm


class Bottleneck(nn.Module):
    """As many libraries write it: one ReLU for all, in place, and a sum in place."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Inverted(nn.Module):
    """A linear bottleneck: what is added is not cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def by_hand() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Bottleneck(6, 6), Bottleneck(6, 9),
        Inverted(9), Inverted(9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 10),
    )  # fmt: skip


# The network, and how many norms are fused with what comes after them.
RELU, CONV, RELU_CONV = "the ReLU", "the convolution", "the ReLU and the convolution"
RELU6_CONV, SUM, SUM_RELU = "the ReLU6 and the convolution", "the sum", "the sum and the ReLU"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: ResNet(18, width=0.125), {RELU: 1, RELU_CONV: 8, SUM_RELU: 8}),
    "wideresnet": (lambda: WideResNet(10, 1), {RELU: 3, RELU_CONV: 4}),
    "vgg11": (lambda: VGG(11, width=0.125), {RELU: 5, RELU_CONV: 3}),
    "by_hand": (by_hand, {RELU: 1, RELU_CONV: 2, RELU6_CONV: 2, SUM: 2, SUM_RELU: 2}),
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def masked(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network in float64 with zeros outside of its masks, and norms that differ by channel."""
    network = NETWORKS[name][0]().double()
    masks = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
        elif isinstance(module, nn.Conv2d):
            masks[path] = torch.rand(module.weight.shape) < 0.3
            masks[path].view(-1)[0] = True
            with torch.no_grad():
                module.weight.mul_(masks[path])
    return network, masks


Results = dict[str, Tensor]


def step(network: nn.Module, x: Tensor, labels: Tensor, masks: dict[str, Tensor]) -> Results:
    """Logits, gradients as the dense network names them, and the state afterwards."""
    dtype = next(network.parameters()).dtype
    leaf = x.to(dtype).clone().requires_grad_()
    logits = network(leaf)
    F.cross_entropy(logits, labels).backward()
    results = {"logits": logits.detach(), "d input": leaf.grad}
    for name, p in network.named_parameters():
        layer, _, last = name.rpartition(".")
        masks_weight = layer in masks and last in ("weight", "values")
        gradient = p.grad[masks[layer]] if masks_weight and last == "weight" else p.grad
        results[f"d {layer}.weight" if masks_weight else f"d {name}"] = gradient.clone()
    network.zero_grad()
    return results | {k: v.clone() for k, v in network.state_dict().items()}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(11, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (11,))


@EVERY
def test_every_norm_that_can_be_is_fused(name: str, computed: list[PendingNorm]) -> None:
    network, masks = masked(name)
    report = fk.sparsify_(network, masks)
    expected = {f"fused: {n} batch norms with {what} after them" for what, n in NETWORKS[name][1].items()}
    assert {note for note in report.notes if note.startswith("fused")} == expected
    step(network, *batch(), masks)
    assert not computed


@EVERY
def test_in_double_it_is_the_dense_network(name: str) -> None:
    dense, masks = masked(name)
    fused = fk.sparsify(dense, masks)
    unfused = fk.sparsify(dense, masks, fuse=False)
    for training in (True, True, False):
        for network in (dense, fused, unfused):
            network.train(training)
        x, labels = batch()
        expected, ours, apart = (step(network, x, labels, masks) for network in (dense, fused, unfused))
        for key, value in ours.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )
            assert torch.equal(value, apart[key]), key


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_single_it_errs_no_more_than_dense_torch(name: str, training: bool) -> None:
    """max error <= 2 x that of dense torch in float32 (3 x for gradients), plus a floor."""
    exact, masks = masked(name)
    exact.train(training)
    single = copy.deepcopy(exact).float()
    fused = fk.sparsify(single, masks)
    x, labels = batch()
    expected, theirs, ours = (step(network, x, labels, masks) for network in (exact, single, fused))
    for key, value in ours.items():
        reference = expected[key].double()
        floor = 64 * torch.finfo(torch.float32).eps * float(reference.abs().max())
        limit = (3 if key.startswith("d ") else 2) * float((theirs[key] - reference).abs().max()) + floor
        assert float((value - reference).abs().max()) <= limit, key


@EVERY
def test_copies_pickles_and_state_dicts(name: str, computed: list[PendingNorm]) -> None:
    dense, masks = masked(name)
    fused = fk.sparsify(dense, masks)
    x, labels = batch()
    twins = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    fresh = fk.sparsify(masked(name)[0], masks)
    fresh.load_state_dict(fused.state_dict())
    expected = step(fused, x, labels, masks)
    for twin in (*twins, fresh):
        for key, value in step(twin, x, labels, masks).items():
            assert torch.equal(value, expected[key]), key
    assert not computed
    again = fk.densify_(copy.deepcopy(fused))
    assert {type(m) for m in again.modules()} == {type(m) for m in dense.modules()}
    dense.load_state_dict(fused.state_dict())
    dense.eval()
    again.eval()
    assert torch.equal(again(x), dense(x))
