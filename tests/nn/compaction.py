# SPDX-License-Identifier: Apache-2.0
"""Networks with channels that masks leave without use, and how a compacted one is compared with the masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpai.models.resnet import ResNet
from fedpai.models.small import MLP, Conv4, LeNet5
from fedpai.models.vgg import VGG
from fedpai_kernels.nn import parts_of

Masks = dict[str, Tensor]


class Separable(nn.Module):
    """Inverted residual blocks: 1x1, depthwise, 1x1, with a sum where the shape allows, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList([self._block(16, 24), self._block(16, 24)])
        self.gate = nn.Conv2d(16, 16, 1)
        self.wide = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    @staticmethod
    def _block(channels: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(),
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        for block in self.blocks:
            x = x + block(x)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.gelu(self.wide(x)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(18, width=0.25),
    "vgg11": lambda: VGG(11, width=0.25),
    "separable": Separable,
    "lenet5": lambda: LeNet5(image_size=16),
    "conv4": lambda: Conv4(width=0.25, image_size=8),
    "mlp": lambda: MLP(image_size=4, width=0.5),
}
SIZES = {"mlp": 4, "conv4": 8}


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Masks, Tensor]:
    """A network with zeros outside of its masks, the masks, and images.

    Of each number of channels, a third is read by nobody; other weights are kept at random. Some rows are empty too.
    """
    torch.manual_seed(2)
    model = NETWORKS[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    masks = dead_channels(model)
    apply(model, masks)
    side = SIZES.get(name, 16)
    return model, masks, torch.randn(6, 3, side, side, dtype=dtype)


def dead_channels(model: nn.Module, density: float = 0.4) -> Masks:
    draw = torch.Generator().manual_seed(5)
    unread: dict[int, Tensor] = {}
    masks: Masks = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        mask = torch.rand(module.weight.shape, generator=draw) < density
        mask[torch.rand(len(mask), generator=draw) < 0.2] = False
        channels = mask.shape[1] if mask.dim() == 4 else _channels(mask.shape[1])
        if channels > 3 and channels not in unread:
            unread[channels] = torch.rand(channels, generator=draw) < 0.33
        if channels > 3:
            mask.view(len(mask), channels, -1)[:, unread[channels]] = False
        mask.view(-1)[-1] |= not mask.any()
        masks[name] = mask
    return masks


def _channels(features: int) -> int:
    """What the inputs of a linear layer of NETWORKS are pixels of."""
    return {128: 32, 48: 3}.get(features, features)


def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)  # type: ignore[operator]


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input; gradients of parameters stay where they are."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def check_same(dense: nn.Module, compacted: nn.Module, x: Tensor, **tolerance: Any) -> None:
    """Outputs, gradients of all that is left, and what training leaves in the buffers."""
    for training in (True, False):
        theirs, ours = step(dense.train(training), x), step(compacted.train(training), x)
        torch.testing.assert_close(ours, theirs, **tolerance)
        check_tensors(dense, compacted, gradients=True, **tolerance)
        check_tensors(dense, compacted, **tolerance)


def check_tensors(dense: nn.Module, compacted: nn.Module, gradients: bool = False, **tolerance: Any) -> None:
    """Parameters and buffers that are left, or their gradients, against the masked network's."""
    modules = dict(compacted.named_modules())
    for key, tensor in {**dict(dense.named_parameters()), **dict(dense.named_buffers())}.items():
        if gradients and tensor.grad is None:
            continue
        path, _, name = key.rpartition(".")
        positions, part = parts_of(modules[path], name)[0]
        theirs, ours = (tensor.grad, part.grad) if gradients else (tensor, part)
        assert theirs is not None
        assert ours is not None
        torch.testing.assert_close(
            ours.reshape(-1), theirs.reshape(-1)[positions], msg=lambda m, key=key: f"{key}: {m}", **tolerance
        )


def train(model: nn.Module, x: Tensor, steps: int, masks: Mapping[str, Tensor] | None = None) -> list[float]:
    """Losses of SGD with momentum and weight decay; with masks, of a dense model whose masked weights stay zero."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.05)
    labels = torch.arange(len(x)) % 10
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(model.train()(x), labels)
        loss.backward()
        for name, mask in (masks or {}).items():
            model.get_submodule(name).weight.grad.mul_(mask)  # type: ignore[union-attr,operator]
        optimiser.step()
        losses.append(loss.item())
    return losses


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
