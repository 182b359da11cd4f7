# SPDX-License-Identifier: Apache-2.0
"""The model that the conversion tests share, and a training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Small(nn.Module):
    """Every kind of layer that is converted, a shortcut, and a ReLU that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 8, 1)
        self.pool2 = nn.AvgPool2d(2)
        self.pool3 = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.norm1(self.stem(x))))
        x = torch.relu(self.norm2(self.conv(x)) + x)
        x = self.pool3(self.pool2(self.plain(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


DENSITY = {"stem": 0.9, "conv": 0.2, "hidden": 0.1, "head": 0.8}


def masked_model() -> tuple[Small, dict[str, Tensor]]:
    """A model in double with zeros outside of its masks; `plain` has none."""
    model = Small().double()
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) < d for name, d in DENSITY.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    return model, masks


def fingerprint(model: nn.Module) -> list[Any]:
    """Types, parameters, buffers and hooks, with identities."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, type(module), id(module), list(module._forward_pre_hooks)))
        found += [(name, key, id(p)) for key, p in module._parameters.items()]
        found += [(name, key, id(b)) for key, b in module._buffers.items()]
    return found


def train(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], masks: dict[str, Tensor] | None = None, lr: float = 0.1
) -> list[float]:
    """Losses of SGD steps; with masks, on a dense model whose masked weights get no gradient."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for x, y in data:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for name, mask in (masks or {}).items():
            model.get_submodule(name).weight.grad.mul_(mask)
        optimiser.step()
        losses.append(loss.item())
    return losses
