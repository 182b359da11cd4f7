# SPDX-License-Identifier: Apache-2.0
"""What every backend's convolution and linear layers ask of their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import Plan


class Backend(NamedTuple):
    """What the kernels of one backend take."""

    dtypes: Callable[[Tensor], tuple[torch.dtype, ...]]  # of x, where it is
    check_device: Callable[[Tensor], None]  # raises unless they can run there
    single_weights: bool = False  # bfloat16 images have float32 values and bias
    clients: bool = False  # values, bias and x may be those of K clients, (K, ...)


_NATIVE = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.bfloat16)}


def _native_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return _NATIVE.get(x.device.type, _NATIVE["cpu"])


def _check_native_device(x: Tensor) -> None:
    if x.device.type not in _NATIVE:
        raise ValueError(
            f"x: expected a CPU or CUDA tensor, got one on {x.device}; there are no kernels for that device"
        )


NATIVE = Backend(_native_dtypes, _check_native_device, single_weights=True)
"""The C++ and CUDA kernels, by the device of x."""

MANY_CLIENTS = NATIVE._replace(clients=True)
"""Those that may be called for several clients at once."""


def check_operands(x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None, backend: Backend = NATIVE) -> None:
    """What convolution and linear layers ask of their operands alike.

    Raises:
        TypeError: not tensors, no Plan, or a dtype that the backend does not take.
        ValueError: devices that differ, values or bias of the wrong shape, or another number of clients in each.
        Whatever the backend raises about the device of x.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a fedpai_kernels.Plan, got {type(plan).__name__}")
    for name, tensor in (("x", x), ("values", values), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    dtypes = backend.dtypes(x)
    if x.dtype not in dtypes:
        *others, last = map(str, dtypes)
        raise TypeError(f"x: expected dtype {', '.join(others)} or {last}, got {x.dtype}")
    backend.check_device(x)
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got one of layout {x.layout}")
    clients = tuple(values.shape[:-1]) if backend.clients and values.dim() == 2 else ()
    if tuple(values.shape) != (*clients, plan.nnz):
        several = f" (or (K, {plan.nnz}) of K clients)" if backend.clients else ""
        raise ValueError(
            f"values: expected shape ({plan.nnz},), one per surviving weight of the plan{several}, got "
            f"{tuple(values.shape)}"
        )
    whose = f", as values are those of {clients[0]} clients" if clients else ""
    if bias is not None and tuple(bias.shape) != (*clients, plan.mask_shape[0]):
        raise ValueError(f"bias: expected shape {(*clients, plan.mask_shape[0])}{whose}, got {tuple(bias.shape)}")
    if tuple(x.shape[: len(clients)]) != clients:
        raise ValueError(f"x: expected a first dimension of {clients[0]}{whose}, got shape {tuple(x.shape)}")
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is None:
            continue
        if backend.single_weights and x.dtype == torch.bfloat16:
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected torch.float32 with an x of {x.dtype}, got {tensor.dtype}")
        elif tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
