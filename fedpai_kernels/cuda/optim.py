# SPDX-License-Identifier: Apache-2.0
"""Optimiser steps on a CUDA device: all parameters of a group in one launch (480 at a time).

Functions, as torch's own ``torch.optim.sgd.sgd``: the caller keeps state and counts steps. Parameters, gradients and
state are float32 tensors on one device, dense, each stored like its parameter; everything but gradients is changed in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from . import library


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_lists(lists: dict[str, Sequence[Tensor]]) -> torch.device | None:
    """The device that all tensors of these lists are on; None where the lists are empty.

    Raises:
        TypeError: a tensor that is not float32.
        ValueError: lists of several lengths, or a tensor on another device, of another shape or strides than its
            parameter, or with gaps.
    """
    params = lists["params"]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name}: got {len(tensors)} tensors for {len(params)} parameters")
        for k, (tensor, p) in enumerate(zip(tensors, params, strict=True)):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}[{k}]: got {tensor.dtype}, expected torch.float32")
            if not tensor.is_cuda or tensor.device != params[0].device:
                raise ValueError(f"{name}[{k}]: got a tensor on {tensor.device}, expected one CUDA device for all")
            if tensor.shape != p.shape or tensor.stride() != p.stride():
                raise ValueError(f"{name}[{k}]: its shape or strides are not those of params[{k}]")
            if not is_dense(tensor):
                raise ValueError(f"{name}[{k}]: expected a dense tensor, got strides {tensor.stride()}")
    return params[0].device if params else None


def _address(tensors: Sequence[Tensor], k: int) -> int | None:
    return tensors[k].data_ptr() if tensors else None


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    first: Sequence[bool],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """One step of SGD, as of :class:`torch.optim.SGD`.

    Args:
        buffers: momentum buffers; none without momentum.
        first: for each buffer whether it holds nothing yet; none without momentum.

    Raises:
        TypeError, ValueError: lists or tensors that do not fit.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    state = {"buffers": buffers} if momentum != 0 else {}
    device = _check_lists({"params": params, "grads": grads, **state})
    if momentum != 0 and len(first) != len(params):
        raise ValueError(f"first: got {len(first)} for {len(params)} parameters")
    if device is None:
        return
    used = buffers if momentum != 0 else ()
    chunks = (library.SgdChunk * len(params))(
        *(
            library.SgdChunk(
                p.data_ptr(), grads[k].data_ptr(), _address(used, k), p.numel(), int(momentum != 0 and first[k])
            )
            for k, p in enumerate(params)
        )
    )
    options = library.SgdOptions(lr, momentum, dampening, weight_decay, int(nesterov), int(maximize))
    with library.on(device) as (cuda, stream):
        cuda.call("sgd_step", chunks, len(params), byref(options), stream)


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    *,
    step: float | Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """One step of Adam, as of :class:`torch.optim.Adam`, or with `decoupled` of AdamW.

    Args:
        max_exp_avg_sqs: with amsgrad; else none.
        step: the number of this step, 1 the first time. Or for each parameter a float32 tensor of one element on the
            device that holds it: then a captured step counts on when it is replayed, if the counting is captured too.

    Raises:
        TypeError, ValueError: lists or tensors that do not fit.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    device = _check_lists({**lists, **({"max_exp_avg_sqs": max_exp_avg_sqs} if max_exp_avg_sqs else {})})
    counted: Sequence[Tensor] = () if isinstance(step, int | float) else step
    number = float(step) if isinstance(step, int | float) else 0.0
    if not isinstance(step, int | float) and len(counted) != len(params):
        raise ValueError(f"step: got {len(counted)} tensors for {len(params)} parameters")
    for k, tensor in enumerate(counted):
        if tensor.dtype != torch.float32 or tensor.numel() != 1 or tensor.device != device:
            raise ValueError(
                f"step[{k}]: expected one float32 element on {device}, got {tensor.numel()} of {tensor.dtype} "
                f"on {tensor.device}"
            )
    if device is None:
        return
    chunks = (library.AdamChunk * len(params))(
        *(
            library.AdamChunk(
                p.data_ptr(), grads[k].data_ptr(), exp_avgs[k].data_ptr(), exp_avg_sqs[k].data_ptr(),
                _address(max_exp_avg_sqs, k), _address(counted, k), p.numel(),
            )
            for k, p in enumerate(params)
        )
    )  # fmt: skip
    options = library.AdamOptions(lr, beta1, beta2, eps, weight_decay, number, int(decoupled), int(maximize))
    with library.on(device) as (cuda, stream):
        cuda.call("adam_step", chunks, len(params), byref(options), stream)
