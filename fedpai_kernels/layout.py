# SPDX-License-Identifier: Apache-2.0
"""The batch-last layout: a tensor keeps its shape (N, C, H, W) but is stored C, H, W, N.

It is to the batch what torch's ``channels_last`` is to the channels: a choice of strides, invisible to the
arithmetic, kept by torch's elementwise operations. One channel is one contiguous row and one pixel is a
contiguous run of the batch, so that a kernel moves by whole batches at any stride, padding or dilation. A 2-D
tensor (N, F) is stored F, N: the flattening of a batch-last (N, C, H, W) is such a tensor, and costs nothing.

Images of K clients, (K, N, C, H, W), are stored K, C, H, W, N: each client's are batch-last. All of them together are
batch-last images of K * C channels too, ``x.transpose(0, 1).flatten(1, 2)``, which costs nothing either.

A dimension of size 1 leaves its stride without meaning, so a tensor can be in both layouts: at N = 1 every
contiguous tensor is batch-last too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _C, memory

__all__ = ["empty_batch_last", "is_batch_last", "to_batch_last", "to_contiguous"]


_RANKS = (2, 4, 5)
_SHAPES = "(N, C, H, W), (K, N, C, H, W) or (N, F)"


def _batch_dimension(rank: int) -> int:
    return max(rank - 4, 0)


def _storage_order(rank: int) -> tuple[int, ...]:
    """Dimensions from the outermost in storage to the innermost."""
    batch = _batch_dimension(rank)
    return (*range(batch), *range(batch + 1, rank), batch)


def _of_each_client(x: Tensor) -> tuple[Tensor, ...]:
    return x.unbind(0) if x.dim() == 5 else (x,)


def _check_rank(x: Tensor, function: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: x: expected a tensor, got {type(x).__name__}")
    if x.dim() not in _RANKS:
        raise ValueError(f"{function}: x: expected a shape {_SHAPES}, got {tuple(x.shape)}")


def is_batch_last(x: Tensor) -> bool:
    """Whether `x`, (N, C, H, W), (K, N, C, H, W) or (N, F), is stored C, H, W, N, or K, C, H, W, N, or F, N without
    gaps. False for other ranks.
    """
    if x.dim() not in _RANKS or x.layout is not torch.strided:
        return False
    shape, strides = x.shape, x.stride()
    if len(shape) == 4 and strides == (1, shape[2] * shape[3] * shape[0], shape[3] * shape[0], shape[0]):
        return True  # nearly always, and at once
    if x.numel() == 0:
        return True
    expected = 1
    for d in reversed(_storage_order(x.dim())):
        size = shape[d]
        if size != 1:
            if strides[d] != expected:
                return False
            expected *= size
    return True


def empty_batch_last(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uninitialised tensor of `shape`, (N, C, H, W), (K, N, C, H, W) or (N, F), in batch-last storage.

    A large one on the CPU takes its memory from :mod:`fedpai_kernels.memory` where `dtype` and `device` are
    given.
    """
    if len(shape) == 2:
        strides: tuple[int, ...] = (1, shape[0])
    elif len(shape) in _RANKS:
        n, c, h, w = shape[-4:]
        strides = (1, h * w * n, w * n, n)
        if len(shape) == 5:
            strides = (c * h * w * n, *strides)
    else:
        raise ValueError(f"empty_batch_last: shape: expected {_SHAPES}, got {tuple(shape)}")
    shape = tuple(shape)
    if dtype is None or device is None:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return memory.empty_strided(shape, strides, dtype=dtype, device=device)


_TRANSPOSE = {torch.float32: _C.transpose_f32, torch.float64: _C.transpose_f64}


def _ours(x: Tensor) -> bool:
    """Whether the transposing kernel can copy `x`, rather than torch."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in _TRANSPOSE
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not x.is_neg()  # a view whose sign is still to be turned
    )


def _transpose(x: Tensor, y: Tensor, rows: int) -> Tensor:
    """Copies `x`, a matrix of so many rows without gaps (of each client), into `y`, its transpose."""
    with torch.profiler.record_function("fedpai::transpose"):  # no operation of torch's, so no profile would show it
        for source, dest in zip(_of_each_client(x), _of_each_client(y), strict=True):
            columns = source.numel() // rows
            _TRANSPOSE[x.dtype](source.data_ptr(), rows, columns, dest.data_ptr(), torch.get_num_threads())
    return y


def _transposed(x: Tensor) -> Tensor:
    """Batch-last copy of `x`."""
    if x.is_contiguous() and _ours(x):
        y = empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
        return _transpose(x, y, x.shape[_batch_dimension(x.dim())])
    if x.dim() == 5:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if x.is_contiguous():
        # As a matrix: torch's transposing copy goes in blocks for two dimensions only, several times faster.
        flat = x.view(x.shape[0], -1).t().contiguous()
    else:
        flat = x.permute(_storage_order(x.dim())).contiguous()
    if x.dim() == 2:
        return flat.t()
    _, c, h, w = x.shape
    return flat.view(c, h, w, -1).permute(3, 0, 1, 2)


def _untransposed(x: Tensor) -> Tensor:
    """Contiguous copy of `x`."""
    if is_batch_last(x):
        if _ours(x):
            strides = tuple(math.prod(x.shape[d + 1 :]) for d in range(x.dim()))
            y = memory.empty_strided(tuple(x.shape), strides, dtype=x.dtype, device=x.device)
            return _transpose(x, y, strides[_batch_dimension(x.dim())])
        if x.dim() < 5:
            return x.reshape(x.shape[0], -1).contiguous().view(x.shape)
    return x.contiguous()


class _SavesNothing(torch.autograd.Function):
    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        pass


class _ToBatchLast(_SavesNothing):
    """The gradient comes back contiguous: what produced `x` was no batch-last operation."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _transposed(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        return to_contiguous(dy)


class _ToContiguous(_SavesNothing):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _untransposed(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        return to_batch_last(dy)


class _ContiguousGradient(_SavesNothing):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        return to_contiguous(dy)


def with_contiguous_gradient(x: Tensor) -> Tensor:
    """`x` itself; its gradient comes back in torch's default storage, for what produced `x` is used to that."""
    if not x.requires_grad or torch.compiler.is_compiling():
        return x
    return _ContiguousGradient.apply(x)


def to_batch_last(x: Tensor) -> Tensor:
    """`x`, (N, C, H, W), (K, N, C, H, W) or (N, F) of any dtype and strides, in batch-last storage: `x` itself where
    it is so already.

    Differentiable, any number of times.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` has neither 2 nor 4 nor 5 dimensions.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(to_batch_last, (x,), x)
    _check_rank(x, "to_batch_last")
    if is_batch_last(x):
        return x
    # A compiled backward pass may not ask for strides; torch's own gradient of the copy needs none.
    return _transposed(x) if torch.compiler.is_compiling() else _ToBatchLast.apply(x)


def to_contiguous(x: Tensor) -> Tensor:
    """`x`, (N, C, H, W), (K, N, C, H, W) or (N, F), in torch's default storage; faster than ``x.contiguous()`` from
    batch-last.

    Differentiable, any number of times; the gradient of a batch-last `x` comes back batch-last.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` has neither 2 nor 4 nor 5 dimensions.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(to_contiguous, (x,), x)
    _check_rank(x, "to_contiguous")
    if x.is_contiguous():
        return x
    return _untransposed(x) if torch.compiler.is_compiling() else _ToContiguous.apply(x)
