# SPDX-License-Identifier: Apache-2.0
"""What the functions of this package ask of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..aggregate import checked_weights


def check_tensor(name: str, given: object, dtype: torch.dtype, rank: int, device: torch.device | None = None) -> Tensor:
    """`given`, a dense tensor of this dtype and rank, on a CUDA device, or on `device`.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: of another rank, or on another device.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}, expected a tensor of {dtype}")
    if given.dtype != dtype or given.layout != torch.strided:
        raise TypeError(f"{name}: got {given.dtype}, {given.layout}, expected a dense tensor of {dtype}")
    if given.dim() != rank:
        raise ValueError(f"{name}: got {given.dim()} dimensions, expected {rank}")
    if device is not None and given.device != device:
        raise ValueError(f"{name}: got a tensor on {given.device}, expected one on {device}")
    if device is None and not given.is_cuda:
        raise ValueError(f"{name}: got a tensor on {given.device}, expected one on a CUDA device")
    return given


def check_rows(name: str, given: object, dtype: torch.dtype) -> Tensor:
    """A matrix whose rows have no gaps within; copied where they have.

    Raises:
        TypeError, ValueError: as :func:`check_tensor`, and for a matrix without rows.
    """
    matrix = check_tensor(name, given, dtype, 2)
    if matrix.shape[0] == 0:
        raise ValueError(f"{name}: got no rows, expected at least one")
    within = matrix.shape[1] <= 1 or matrix.stride(1) == 1
    return matrix if within and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def check_weights(weights: Sequence[float] | Tensor, clients: int, device: torch.device) -> Tensor:
    """The weights of so many clients, float64 on the device. A tensor that lies there is taken as it is, unseen.

    Raises:
        TypeError: a tensor that is not float64.
        ValueError: another number of them, or one that is not finite and above 0.
    """
    if isinstance(weights, Tensor) and weights.device != device:
        weights = weights.tolist()
    if isinstance(weights, Tensor):
        if weights.dtype != torch.float64:
            raise TypeError(f"weights: got {weights.dtype}, expected torch.float64")
        if tuple(weights.shape) != (clients,):
            raise ValueError(f"weights: got shape {tuple(weights.shape)} for {clients} clients")
        return weights.contiguous()
    return torch.tensor(checked_weights(weights, clients), dtype=torch.float64).to(device)


def check_state(name: str, tensor: Tensor) -> Tensor:
    """A vector that is changed in place, so nothing may be copied.

    Raises:
        ValueError: it has gaps.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: it is changed in place, so it must be contiguous, got strides {tensor.stride()}")
    return tensor


def check_apart(vectors: Mapping[str, Tensor], changed: Sequence[str]) -> None:
    """That no vector that is `changed` in place shares memory with another one.

    Raises:
        ValueError: one does.
    """

    def span(t: Tensor) -> tuple[int, int]:
        last = max(t.numel() - 1, 0) * (t.stride(0) if t.dim() else 0)
        return t.data_ptr(), t.data_ptr() + (last + 1 if t.numel() else 0) * t.element_size()

    for own in (name for name in changed if name in vectors):
        begin, end = span(vectors[own])
        for name, other in vectors.items():
            first, last = span(other)
            if name != own and first < end and begin < last:
                raise ValueError(f"{own}: it is changed in place, so it must share no memory with {name}")
