# SPDX-License-Identifier: Apache-2.0
"""The end of a residual block, converted with and without its sum fused, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import BatchLastBatchNorm2d


class Block(nn.Module):
    """The end of a residual block; `between` is what its forward does with the norm's result before the sum."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, **settings)
        self.relu = nn.ReLU(inplace=True)
        self.between: Callable[[Any, Tensor], Any] = nothing
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.seen = self.between(self, y)
        return self.relu(y + x)


# What the error says.
CHANGED = "was changed in place before what comes after it was computed; convert the model with fuse=False"


class Double(torch.autograd.Function):
    """x -> 2 x; is given its input without being asked by torch what that is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 2


def nothing(block: Block, y: Tensor) -> None:
    pass


def converted(fuse: bool = True, **settings: Any) -> Block:
    torch.manual_seed(1)
    block = Block(**settings).double()
    if block.norm.affine:
        nn.init.normal_(block.norm.weight)
    fk.sparsify_(block, {"conv": torch.rand(4, 4, 3, 3) < 0.3}, fuse=fuse)
    return block


def images() -> Tensor:
    return fk.to_batch_last(torch.randn(7, 4, 5, 6, dtype=torch.float64))


def results(block: Block, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients, and the state after a step."""
    leaf = x.clone().requires_grad_()
    z = block(leaf)
    z.backward(torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape))
    gradients = {f"d{name}": p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    return {"z": z.detach(), "dx": leaf.grad, **gradients, **copy.deepcopy(block.state_dict())}


def check_fused(block: Block, x: Tensor | None = None) -> None:
    """`block` does what an unfused one does, step by step, in both modes, bit by bit."""
    other = copy.deepcopy(block)
    fk.densify_(other)
    other = fk.sparsify(other, {"conv": block.conv.mask}, fuse=False)
    other.load_state_dict(block.state_dict())
    assert type(other.norm) is BatchLastBatchNorm2d
    for training in (True, True, False):
        block.train(training)
        other.train(training)
        given = images() if x is None else x
        ours, theirs = results(block, given), results(other, given)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
