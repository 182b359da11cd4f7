# SPDX-License-Identifier: Apache-2.0
"""A residual network of every converted layer, and what its autograd functions save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk

BF16 = torch.bfloat16


class Network(nn.Module):
    """A stem without a mask, a block whose first norm is read by a convolution alone, a linear layer."""

    def __init__(self, activate: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activate = activate
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 6, 3, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.norm(self.stem(x)))
        y = self.conv2(self.activate(self.norm1(self.conv1(x))))
        x = self.activate(self.norm2(y) + x)
        x = self.pool(self.conv3(x))
        return self.head(x.mean((2, 3)))


MASKED = ("conv1", "conv2", "conv3", "head")


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {n: torch.rand(model.get_submodule(n).weight.shape, generator=draw) < 0.3 for n in MASKED}


def network(
    activation_dtype: torch.dtype | None = BF16, activate: Callable[[Tensor], Tensor] = F.relu, **options: Any
) -> Network:
    torch.manual_seed(1)
    model = Network(activate)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    fk.sparsify_(model, masks_of(model), activation_dtype=activation_dtype, **options)
    return model


def images(batch: int = 9) -> Tensor:
    return torch.randn(batch, 3, 12, 10, generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the loss for some labels, in x and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    assert x.grad is not None
    return {"x": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def saved_by(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor with images that a forward pass saves."""
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.shape[0] == len(x):
            found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return found
