# SPDX-License-Identifier: Apache-2.0
"""Activations that are kept for the backward pass as bfloat16: half the memory, eight bits of precision.

What is computed stays float32. An autograd function that is asked to store its input (``activation_dtype``) saves a
rounded copy in its place; the original is free as soon as the forward pass has no more use for it. The backward pass
reads the copy as it is, or widened for as long as one kernel reads it.

There is one copy of a tensor, whoever keeps it: a batch norm's result, which the ReLU's gradient and the next
convolution both need, is rounded once. It is made when the first of them asks, and goes with the last one that holds
it, as torch frees what a backward pass has used.

A copy counts the changes of its original: it shares the version counter. Changing a tensor in place after it was
stored makes the backward pass raise, as it does for a tensor that is kept itself, although the copy would be unharmed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C, memory
from ..layout import is_batch_last, to_batch_last
from .registry import LIBRARY

__all__ = ["check_activation_dtype", "refuse_graph", "stored", "stores", "widened"]

# ---- the ops: dense tensors of any strides in, the same strides out
# ----------------------------------------------------------------------------------------------------------------

LIBRARY.define("round_to_bf16(Tensor x) -> Tensor")
LIBRARY.define("widen_bf16(Tensor x) -> Tensor")


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return memory.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def _round(x: Tensor) -> Tensor:
    y = _like(x, torch.bfloat16)
    _C.round_to_bf16(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


def _widen(x: Tensor) -> Tensor:
    y = _like(x, torch.float32)
    _C.widen_bf16(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


LIBRARY.impl("round_to_bf16", _round, "CPU")
LIBRARY.impl("widen_bf16", _widen, "CPU")


@torch.library.register_fake("fedpai::round_to_bf16", lib=LIBRARY)
def _(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device)


@torch.library.register_fake("fedpai::widen_bf16", lib=LIBRARY)
def _(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device=x.device)


# ---- whether to store
# ----------------------------------------------------------------------------------------------------------------


def check_activation_dtype(activation_dtype: torch.dtype | None) -> None:
    """Raises ValueError for what is neither None nor `torch.bfloat16`."""
    if activation_dtype is not None and activation_dtype is not torch.bfloat16:
        raise ValueError(
            f"activation_dtype: expected None (kept as they are) or torch.bfloat16, got {activation_dtype!r}"
        )


def stores(x: Tensor, activation_dtype: torch.dtype | None) -> bool:
    """Whether an autograd function that is about to be applied to `x` stores activations.

    Not where gradients are off, nor where something else decides what is kept or looks on: `torch.compile`, tracing,
    `torch.func`, dispatch modes, subclasses of tensors.

    Raises:
        ValueError: an `activation_dtype` other than None and bfloat16, or one with an `x` on a CUDA device.
        TypeError: bfloat16 with an `x` that is not float32.
    """
    if activation_dtype is None:
        return False
    check_activation_dtype(activation_dtype)
    if x.is_cuda:
        raise ValueError(
            f"activation_dtype: activations are stored in {activation_dtype} on the CPU only, got x on {x.device}; "
            "there x may itself be bfloat16"
        )
    if x.dtype != torch.float32:
        raise TypeError(
            f"activation_dtype: {activation_dtype} stands in for float32 activations, got x of dtype {x.dtype}"
        )
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_inference()  # torch says what is wrong with keeping one
    )


# ---- storing
# ----------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    original: weakref.ref[Tensor]
    version: int  # of the original when it was rounded
    copy: weakref.ref[Tensor]


_COPIES: dict[int, _Entry] = {}  # by the id of the original


def stored(x: Tensor, rounding: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What to give `ctx.save_for_backward` in place of `x`, float32: its copy in bfloat16, the one that there is
    already where somebody else has stored `x` as it is now.

    Of the strides of `x` where that is contiguous or batch-last, else batch-last.

    Args:
        rounding: how to round where a copy is made, if not to nearest; to one of the two neighbours.
    """
    entry = _COPIES.get(id(x))
    if entry is not None and entry.original() is x and entry.version == x._version:
        copy = entry.copy()
        if copy is not None:
            return copy
    rounding = torch.ops.fedpai.round_to_bf16 if rounding is None else rounding
    dense = x.detach() if x.is_contiguous() or is_batch_last(x) else to_batch_last(x.detach())
    copy = x.detach()  # shares the version counter, and keeps it when it is given other numbers
    copy.data = rounding(dense)
    key = id(x)
    _COPIES[key] = entry = _Entry(weakref.ref(x, _forgetter(key)), x._version, weakref.ref(copy))
    return copy


def _forgetter(key: int) -> Any:
    def forget(dead: weakref.ref[Tensor]) -> None:
        entry = _COPIES.get(key)
        if entry is not None and entry.original is dead:
            del _COPIES[key]

    return forget


# ---- using what was stored
# ----------------------------------------------------------------------------------------------------------------


def widened(x: Tensor) -> Tensor:
    """`x` itself, or the float32 numbers of one in bfloat16, with its strides."""
    if x.dtype != torch.bfloat16:
        return x
    wide: Tensor = torch.ops.fedpai.widen_bf16(x)
    return wide


def refuse_graph(*saved: Tensor | None) -> None:
    """Raises RuntimeError if gradients of gradients are asked of an activation that was stored: rounding has cut it off
    from what it was computed from.
    """
    if any(t is not None and t.is_cpu and t.dtype == torch.bfloat16 for t in saved):
        raise RuntimeError(
            "activation_dtype: gradients of gradients (create_graph=True) need activations as they were, but they are "
            "stored as torch.bfloat16; use activation_dtype=None"
        )
