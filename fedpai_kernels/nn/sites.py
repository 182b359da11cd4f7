# SPDX-License-Identifier: Apache-2.0
"""Where in a model a batch norm may wait for what comes after it, and what must be the same when it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import NONE, RELU, Activation
from ..ops.registry import is_watched_by_torch

__all__ = ["Site", "Surroundings", "back_in", "is_watched_by_torch", "reads_pending_norms", "submodule", "surroundings"]

Surroundings = tuple[bool, bool, "tuple[Any, Any] | None"]


def surroundings() -> Surroundings:
    """Gradient modes, and the hooks on saved tensors. A part of a forward that has its own, such as one that is
    checkpointed, may run again without the rest, and must do the same then.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks


def _as_it_is(t: Tensor) -> Tensor:
    return t


@contextlib.contextmanager
def back_in(before: Surroundings) -> Iterator[None]:
    grad, inference, hooks = before
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if hooks != surroundings()[2]:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*(hooks or (_as_it_is, _as_it_is))))
        yield


@dataclass(frozen=True)
class Site:
    """A place in the forward of a module, the owner, where a batch norm's result is added to, cut, or both.

    Attributes:
        norm: path of the norm from the owner.
        between: paths of the modules, outermost first, through whose forward the norm is called.
        activation_module: path of the activation, or "" where it is a function or there is none.
        adds: whether the norm is added to something.
        activation: what comes after those.
        conv: path of the :class:`SparseConv2d` that alone reads the result, or "".
    """

    norm: str
    between: tuple[str, ...]
    activation_module: str
    adds: bool
    activation: Activation
    conv: str = ""

    @property
    def activates(self) -> bool:
        return self.activation != NONE

    @property
    def relu(self) -> bool:
        return self.activation == RELU

    @property
    def what(self) -> str:
        """What comes after the norm, in words."""
        return " and ".join(
            ["the sum"] * self.adds
            + [self.activation.title] * self.activates
            + ["the convolution"] * bool(self.conv)
        )

    def computed(self, owner: nn.Module) -> list[nn.Module]:
        """The modules that are computed in one: the norm first."""
        return [submodule(owner, path) for path in (self.norm, self.activation_module, self.conv) if path]

    def watched(self, owner: nn.Module) -> list[nn.Module]:
        """The modules whose hooks would see what is not computed: the norm first."""
        return [*self.computed(owner), *[submodule(owner, path) for path in self.between]]


def submodule(owner: nn.Module, path: str) -> nn.Module:
    """`owner.get_submodule(path)` in a fifth of the time: every call of an owner asks for several.

    Raises:
        AttributeError: there is none.
    """
    module: nn.Module | None = owner
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    if module is None:
        raise AttributeError(f"{type(owner).__name__} has no submodule {path!r}")
    return module


def reads_pending_norms(module: nn.Module) -> bool:
    """Whether a module computes what a :class:`PendingNorm` puts off together with its own work."""
    return getattr(type(module), "reads_pending_norms", False) is True

