# SPDX-License-Identifier: Apache-2.0
"""The torch library that all ops are registered in, and what their autograd functions share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.utils import unwrap_dead_wrappers

LIBRARY = torch.library.Library("fedpai", "DEF")

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def is_watched_by_torch() -> bool:
    """Whether a compiler, a dispatch mode, a transform or a tracer looks on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _are_plain(arguments: tuple[object, ...]) -> bool:
    """Whether torch's dispatcher would hand arguments on as they are, to the implementation for the CPU."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is nn.Parameter:
            if not argument.is_cpu or argument.is_neg():  # type: ignore[attr-defined]
                return False
        elif isinstance(argument, Tensor):
            return False
    return True


class Operation(Generic[_Arguments, _Result]):
    """A registered op, for autograd functions to call with the arguments of its implementation, by position.

    torch's way from Python to an implementation in Python passes its dispatcher, which takes about 20 microseconds, and
    more in the middle of a training step, whose data has pushed all of that out of the caches. Where it would change
    nothing, the implementation is called at once: on plain tensors on the CPU, while nobody looks on, profilers
    included.
    """

    def __init__(self, name: str, implementation: Callable[_Arguments, _Result]) -> None:
        self._registered: Any = getattr(torch.ops.fedpai, name)
        self._implementation = implementation

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        watched = (
            is_watched_by_torch()
            or torch._C._len_torch_function_stack() > 0
            or torch._C._autograd._profiler_enabled()
        )
        if watched or kwargs or not _are_plain(args):
            result: _Result = self._registered(*args, **kwargs)
            return result
        return self._implementation(*args, **kwargs)


def called_by_position(function: _Function) -> _Function:
    """Class decorator of an autograd function with `setup_context`, for those that every step calls, with every
    argument given, by position.

    torch binds the arguments of each call to the signature of `forward`, in case some are defaults or named: 55
    microseconds, 28 with a signature that need not be worked out anew, and none here. A small layer takes as long.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]

    bound = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return bound(cls, *args)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))

    function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    return function


def gradients_of_aliases(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of ``function(*tensors)`` where `needs` says so, as functions of the tensors: for the backward of
    an autograd function that is to be differentiated again (`create_graph=True`).

    One of the tensors may have been computed from another: the input of a norm from its residual, or from a weight that
    is used twice. `torch.autograd.grad` would then follow that way too, which the backward pass that called follows
    itself. Aliases, which nothing was computed from, keep to the function.
    """
    aliases = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
    y = function(*aliases)
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]
