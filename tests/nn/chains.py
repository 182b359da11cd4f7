# SPDX-License-Identifier: Apache-2.0
"""A norm between two convolutions, converted with and without fusion, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.nn import (
    DeferrableBatchNorm2d,
)


class Chain(nn.Module):
    """conv, norm, ReLU, conv; the forward may do something else in between that was not there when it was traced."""

    def __init__(self, relu: str = "module", bias: bool = True, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, **settings)
        self.relu = nn.ReLU(inplace=relu == "module_in_place")
        self.last = nn.Conv2d(6, 5, 3, padding=1, bias=bias)
        self.kind = relu
        self.after_norm: Callable[[Any, Tensor], Any] = nothing
        self.after_relu: Callable[[Any, Tensor], Any] = nothing
        self.after_last: Callable[[Any, Tensor], Any] = nothing
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.norm(h)
        self.seen = [h]
        self.seen.append(self.after_norm(self, y))
        if self.kind.startswith("module"):
            y = self.relu(y)
        elif self.kind != "none":
            y = RELUS[self.kind](y)
        self.seen.append(self.after_relu(self, y))
        z = self.last(y)
        other = self.after_last(self, y)
        return z if other is None else z + other


def nothing(chain: Chain, y: Tensor) -> None:
    pass


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": torch.relu,
    "functional": F.relu,
    "functional_in_place": lambda y: F.relu(y, inplace=True),
    "method": lambda y: y.relu(),
    "method_in_place": lambda y: y.relu_(),
}
EVERY_RELU = pytest.mark.parametrize("relu", ["module", "module_in_place", "none", *RELUS])
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum_none": {"momentum": None},
    "not_affine": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "none_of_them": {"affine": False, "track_running_stats": False},
}


def mask_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4


def converted(model: nn.Module, fuse: bool = True, **options: Any) -> fk.nn.Report:
    """Converts every convolution of `model`."""
    masks = {name: mask_of(m.weight.shape) for name, m in model.named_modules() if type(m) is nn.Conv2d}
    return fk.sparsify_(model, masks, fuse=fuse, **options)


def both(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The same model, fused and not."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(1)
        model = make().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        converted(model, fuse)
        models.append(model)
    assert any(type(m) is DeferrableBatchNorm2d for m in models[0].modules())
    assert not any(type(m) is DeferrableBatchNorm2d for m in models[1].modules())
    return models[0], models[1]


def chains(relu: str = "module", **settings: Any) -> tuple[Chain, Chain]:
    return both(lambda: Chain(relu, **settings))


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return fk.to_batch_last(torch.randn(7, 4, 5, 6, dtype=dtype, generator=draw))


def outcome(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients, and the state after a step."""
    leaf = x.clone().requires_grad_()
    z = (run or model)(leaf)
    assert type(z) is Tensor
    if z.requires_grad:
        z.backward(torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape))
    gradients = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = {} if leaf.grad is None else {"dx": leaf.grad}
    return {"z": z.detach(), **own, **gradients, **copy.deepcopy(model.state_dict())}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def check_same(fused: nn.Module, plain: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    for training in (True, True, False):
        check_equal(*(outcome(model.train(training), x) for model in (fused, plain)))


def check_close(fused: nn.Module, plain: nn.Module) -> None:
    """Where torch may sum the gradients in another order."""
    for training in (True, True, False):
        ours, theirs = (outcome(model.train(training), images()) for model in (fused, plain))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


class Leaving(nn.Module):
    """A forward that may leave before the convolution, which the trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.leave: Callable[[Tensor, Tensor], Any] | None = None

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        y = self.norm(h)
        if self.leave is not None:
            return self.leave(h, y)
        return self.last(torch.relu(y))
