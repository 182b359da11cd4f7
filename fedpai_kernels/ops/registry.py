# SPDX-License-Identifier: Apache-2.0
"""The torch library that all ops are registered in, and what their autograd functions share."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

LIBRARY = torch.library.Library("fedpai", "DEF")

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def keep_signature(function: _Function) -> _Function:
    """Class decorator of an autograd function with `setup_context`, for those that every step calls.

    torch binds the arguments of each call through `inspect.signature`, which works the signature out anew unless the
    function carries it: 55 instead of 28 microseconds, as much as a small layer.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
