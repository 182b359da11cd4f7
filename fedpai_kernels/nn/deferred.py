# SPDX-License-Identifier: Apache-2.0
"""Norms that wait for what comes after them: a batch norm for the sum, the activation and the convolution, a group norm
for the ReLU.

``relu(norm(x) + shortcut)`` stands in somebody's `forward`, and that code stays: it may branch, draw random
numbers, keep things. So the norm returns a :class:`PendingNorm` there, a tensor that has not been computed yet.
Adding the shortcut to it and taking the ReLU of that, or another activation, computes all three in one pass; a sparse
convolution that alone reads the norm or its activation takes it as it is, and normalises what it loads; anything else
that is done with it computes just what is asked for first. Either way the numbers are those of the separate steps; SiLU
and GELU are this package's own where they are computed with the norm, within a few ulp of torch's.

A norm puts its work off only on a permit, which is valid for one call, within the thread and the call of the module
(the site's owner) whose forward was proven (:mod:`fedpai_kernels.nn.fuse`) to add and cut the result. Two hooks on
the owner give the permit and withdraw it. None is given while anybody could look at a step in between: under hooks,
tracing, `torch.compile` and `torch.func`. So a norm that is called by hand, or under hooks, is a plain one, as is one
in a part of the forward that is checkpointed by itself. When the owner's call ends, the running statistics have taken
the batch in, whether or not anybody read the result, and what it returns is computed.

Replacing the owner's forward by the traced graph would be the other way. It would be wrong wherever the forward does
what a trace does not hold: keep things, draw numbers, branch on attributes that change later.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only

from ..ops.activation import NONE, Activation, activation_of_call
from .group_norm import BatchLastGroupNorm
from .norm import BatchLastBatchNorm2d
from .sites import (
    Site,
    Surroundings,
    back_in,
    is_watched_by_torch,
    reads_pending_norms,
    submodule,
    surroundings,
)
from .waiting import CHANGED, Convolution, WaitingBatchNorm, WaitingGroupNorm, WaitingNorm, version

__all__ = [
    "DeferrableBatchNorm2d",
    "DeferrableGroupNorm",
    "PendingNorm",
    "Site",
    "attach",
    "detach",
    "has_foreign_hooks",
]

# ---- permits
# ----------------------------------------------------------------------------------------------------------------


# Whether gradients are on, whether in inference mode, and the hooks on saved tensors (pack, unpack).


class _Permits(threading.local):
    def __init__(self) -> None:
        # What follows, and the surroundings in which the permit holds.
        self.given: dict[nn.Module, tuple[Site, Surroundings]] = {}
        # Norms that were called, but have not taken the batch into their running statistics.
        self.uncounted: dict[int, WaitingBatchNorm] = {}  # by the id of the module


_PERMITS = _Permits()


@dataclass(frozen=True)
class _Permit:
    """Forward pre-hook of the owner."""

    site: Site

    def __call__(self, owner: nn.Module, args: Any) -> None:
        if is_watched_by_torch() or torch_module._has_any_global_hook():
            return
        try:
            watched = self.site.watched(owner)
            for module in watched:
                if has_foreign_hooks(module) or "forward" in module.__dict__:
                    return
            if self.site.conv and not reads_pending_norms(submodule(owner, self.site.conv)):
                return
            norm = watched[0]
        except AttributeError:  # somebody took a module out
            return
        if type(norm) in _DEFERRABLE.values():
            _PERMITS.given[norm] = self.site, surroundings()


@dataclass(frozen=True)
class _Withdraw:
    """Forward hook of the owner, after errors too."""

    site: Site

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        with contextlib.suppress(AttributeError):
            norm = submodule(owner, self.site.norm)
            _PERMITS.given.pop(norm, None)
            uncounted = _PERMITS.uncounted.pop(id(norm), None)
            if uncounted is not None:
                uncounted.count()
        if type(output) is Tensor:
            return None
        # Another owner's, around this one, goes on waiting.
        return tree_map_only(PendingNorm, lambda y: y.computed() if y._site == self.site else y, output)


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than those of :func:`attach`."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if hooks and not all(isinstance(hook, (_Permit, _Withdraw)) for hook in hooks.values()):
            return True
    return False


def attach(owner: nn.Module, site: Site) -> None:
    """Lets the norm of `site`, a batch-last one, wait in calls of `owner`."""
    norm = submodule(owner, site.norm)
    norm.__class__ = _DEFERRABLE[type(norm)]
    owner.register_forward_pre_hook(_Permit(site))
    owner.register_forward_hook(_Withdraw(site), always_call=True)


def detach(module: nn.Module) -> None:
    """Removes the hooks that :func:`attach` gave `module`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, (_Permit, _Withdraw))]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


# ---- the norm and what it returns
# ----------------------------------------------------------------------------------------------------------------


class DeferrableBatchNorm2d(BatchLastBatchNorm2d):
    """:class:`BatchLastBatchNorm2d`, which a surrounding module may let wait for what comes after it."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        permit = _permit_for(self, input)
        if permit is None or input.dim() != 4 or not self._is_ours(input):
            return super().forward(input)
        site, permitted_in = permit
        uncounted = _PERMITS.uncounted, id(self)
        norm = WaitingBatchNorm(input, self._settings(), permitted_in, *uncounted, self.activation_dtype)
        if norm.updates_statistics():
            _PERMITS.uncounted[id(self)] = norm
        return PendingNorm(norm, None, site)


class DeferrableGroupNorm(BatchLastGroupNorm):
    """:class:`BatchLastGroupNorm`, which a surrounding module may let wait for the ReLU after it."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        permit = _permit_for(self, input)
        if permit is None or not self._is_ours(input):
            return super().forward(input)
        site, permitted_in = permit
        return PendingNorm(WaitingGroupNorm(input, self._settings(), permitted_in, self.activation_dtype), None, site)


_DEFERRABLE: dict[type[nn.Module], type[nn.Module]] = {
    BatchLastBatchNorm2d: DeferrableBatchNorm2d,
    BatchLastGroupNorm: DeferrableGroupNorm,
}


def _permit_for(norm: nn.Module, input: Tensor) -> tuple[Site, Surroundings] | None:
    """The permit for this call of a norm, which has none after it."""
    permit = _PERMITS.given.pop(norm, None)
    if permit is None or type(input) is not Tensor or permit[1] != surroundings():
        return None
    return permit


_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_ADDS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
# Known without computing.
_SHAPES = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement),
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device")),
}


_ASTRAY = (
    "a norm that waits for what comes after it was used where torch cannot ask for its value; "
    "convert the model with fuse=False"
)


class _Astray(torch.autograd.Function):
    """(x, other tensors that enter) -> a :class:`PendingNorm` of x, unfinished.

    An autograd.Function differentiates what it is given without asking what that is; the gradient then arrives here. It
    does so because this lies on the way to the tensors that enter: `torch.autograd.grad` goes only where it has to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor | None) -> Tensor:
        return _uncomputed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        raise RuntimeError(_ASTRAY)


def _uncomputed(x: Tensor) -> Tensor:
    return Tensor._make_wrapper_subclass(PendingNorm, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)


class PendingNorm(Tensor):
    """norm(x), or norm(x) + residual, computed when it is used; see the module's text.

    Of the shape, dtype and device of x. Any operation on it is one on the computed tensor.
    """

    _norm: WaitingNorm
    _residual: Tensor | None
    _residual_version: int
    _site: Site
    _is_activated: bool
    _value: Tensor | None

    @staticmethod
    def __new__(cls, norm: WaitingNorm, residual: Tensor | None, site: Site, is_activated: bool = False) -> PendingNorm:
        made: Any
        if norm.called_in[0]:
            # Not torch's `apply`, which prepares for transforms: there are no permits under those.
            made = super(torch.autograd.Function, _Astray).apply(norm.x, *norm.parameters, residual)
        else:
            made = _uncomputed(norm.x)
        return made

    def __init__(self, norm: WaitingNorm, residual: Tensor | None, site: Site, is_activated: bool = False) -> None:
        self._norm, self._site, self._is_activated, self._value = norm, site, is_activated, None
        self._residual, self._residual_version = residual, version(residual)

    def computed(self) -> Tensor:
        """The tensor that this stands for; the same one each time."""
        if self._value is None:
            self._check_residual_unchanged()
            with back_in(self._norm.called_in):
                self._value = self._norm.compute(self._residual, self._activation())
        return self._value

    def _check_residual_unchanged(self) -> None:
        if version(self._residual) != self._residual_version:
            raise RuntimeError(CHANGED)

    def convolved(self, convolution: Convolution, activation_dtype: torch.dtype | None = None) -> Tensor | None:
        """What a convolution makes of this tensor, where that can be computed in one; else None.

        Args:
            convolution: values, plan, bias, stride, padding (zeros), dilation, groups.
            activation_dtype: how the convolution keeps its input; computed in one only if the norm does the same.
        """
        if not self._is_open() or self._residual is not None or self._site.conv == "":
            return None
        if activation_dtype != self._norm.activation_dtype:
            return None
        if self._site.activates != self._is_activated or convolution[0].dtype != self.dtype:
            return None
        return self._norm.convolve(self._activation(), convolution)

    def _activation(self) -> Activation:
        return self._site.activation if self._is_activated else NONE

    def _is_open(self) -> bool:
        return self._value is None and self._norm.called_in == surroundings()

    def _may_add(self) -> bool:
        return self._residual is None and not self._is_activated and self._is_open()

    def _plus(self, residual: Tensor, in_place: bool) -> Tensor:
        if not self._site.activates:
            z = self._norm.compute(residual, NONE)
            if in_place:
                self._value = z
            return z
        if not in_place:
            return PendingNorm(self._norm, residual, self._site)
        self._residual, self._residual_version = residual, version(residual)
        return self

    def _activated(self, in_place: bool) -> Tensor:
        self._check_residual_unchanged()
        if self._site.conv:
            if not in_place:
                return PendingNorm(self._norm, self._residual, self._site, True)
            self._is_activated = True
            return self
        z = self._norm.compute(self._residual, self._site.activation)
        if in_place:
            self._value = z
        return z

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # What a norm gives up when it is asked for something else is a fused pass, never a number.
        if len(args) == 2 and not kwargs and (func in _ADDS or func in _ADDS_IN_PLACE):
            a, b = args
            if func in _ADDS and isinstance(b, cls) and not isinstance(a, cls):
                a, b = b, a
            if isinstance(a, cls) and a._may_add() and a._norm.takes(b):
                return a._plus(b, func in _ADDS_IN_PLACE)
        called = activation_of_call(func, args, kwargs)
        if called is not None:
            a, (activation, in_place) = args[0], called
            if a._site.activation == activation and not a._is_activated and a._is_open():
                return a._activated(in_place)
        args, kwargs = tree_map_only(cls, cls.computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it as an instance's method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise TypeError(f"{func}: {_ASTRAY}")
