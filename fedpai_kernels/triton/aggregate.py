# SPDX-License-Identifier: Apache-2.0
"""Merging on a server with a GPU: means of clients' values, one launch for a whole model.

    merged = aggregate.weighted_mean(values, weights)                  one mask for all: values (clients, weights kept)
    masks = aggregate.ClientMasks(positions, size)                     each client under its own mask: once per masks,
    merged = aggregate.masked_mean(old, values, masks, weights)        then per round

The results of :mod:`fedpai_kernels.aggregate` (not compensated), bit for bit: float64 sums in the order of the
clients. Weights are a tensor on the device, so that nothing waits for it and a graph may be captured; they are not
looked at, and must be finite and above 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime import check_device, current

__all__ = ["ClientMasks", "masked_mean", "weighted_mean"]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_k weights[k] * values[k] / sum_k weights[k]``, element by element.

    Args:
        values: (clients, size), float32, at least one client; rows of adjacent elements.
        weights: (clients,), float64, on the same device.

    Returns:
        (size,), float32, each element rounded once.

    Raises:
        TypeError: what is not a tensor, or of another dtype.
        ValueError: shapes, devices or strides that do not fit.
        RuntimeError: Triton is not installed.
    """
    _check("values", values, torch.float32, 2)
    check_device(values)
    _check_weights(weights, values.shape[0], values.device)
    if values.shape[1] > 1 and values.stride(1) != 1:
        raise ValueError(f"values: expected rows of adjacent elements, got strides {values.stride()}")
    import triton

    from .kernels.aggregate import ELEMENTS, mean_kernel

    out = values.new_empty(values.shape[1])
    if out.numel():
        with current(values.device):
            mean_kernel[(triton.cdiv(out.numel(), ELEMENTS),)](
                values, weights, out, values.shape[0], out.numel(), values.stride(0), ELEMENTS=ELEMENTS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


class ClientMasks:
    """Which elements each client keeps, as bitmaps and ranks: made once, used every round that has these masks.

    Attributes:
        clients, size: how many of each.
        kept: values of all clients together.
        words: int32 (clients, ceil(size / 32)), bit j % 32 of word j // 32 set where element j is kept.
        ranks: int32, of the same shape: where in all clients' values that of a word's first set bit lies.
    """

    def __init__(self, positions: Sequence[Tensor], size: int) -> None:
        """
        Args:
            positions: per client int32 or int64 of one dimension, ascending and without repeats, all on one device.
            size: elements of the model.

        Raises:
            TypeError: what is not a tensor, or of another dtype.
            ValueError: no clients, positions that cannot be, or 2^31 values or more in all.
        """
        if not positions:
            raise ValueError("positions: got none, expected those of at least one client")
        rows = -(-size // 32)
        device = positions[0].device if isinstance(positions[0], Tensor) else None
        words, ranks, start = [], [], 0
        for k, places in enumerate(positions):
            name = f"positions[{k}]"
            _check(name, places, (torch.int32, torch.int64), 1)
            if places.device != device:
                raise ValueError(f"{name}: expected the device of positions[0], {device}, got {places.device}")
            places = places.long()
            ordered = bool((places[1:] > places[:-1]).all())
            if places.numel() and not (ordered and places[0] >= 0 and places[-1] < size):
                raise ValueError(f"{name}: expected ascending positions without repeats in [0, {size})")
            kept = torch.zeros(rows * 32, dtype=torch.int64, device=device)
            kept[places] = 1
            kept = kept.view(rows, 32)
            counts = kept.sum(1)
            ranks.append(start + counts.cumsum(0) - counts)
            words.append((kept << torch.arange(32, device=device)).sum(1))
            start += places.numel()
        if start >= 2**31:
            raise ValueError(f"positions: got {start} values in all, expected fewer than 2^31")
        self.clients, self.size, self.kept = len(positions), size, start
        self.ranks = torch.stack(ranks).int()
        self.words = torch.stack(words).int()  # the highest bit becomes the sign


def masked_mean(old: Tensor, values: Tensor, masks: ClientMasks, weights: Tensor) -> Tensor:
    """The weighted mean of each element over the clients that keep it; `old` where nobody does.

    Args:
        old: (masks.size,), float32.
        values: (masks.kept,), float32: the values of all clients, one after the other, each in the order of its
            positions.
        masks: which client keeps what.
        weights: (clients,), float64. All tensors are on the device of the masks and contiguous.

    Returns:
        (masks.size,), float32, each element rounded once.

    Raises:
        TypeError: what is not a tensor, or of another dtype.
        ValueError: shapes, devices or strides that do not fit.
        RuntimeError: Triton is not installed.
    """
    for name, given, size in (("old", old, masks.size), ("values", values, masks.kept)):
        _check(name, given, torch.float32, 1)
        if given.numel() != size or not given.is_contiguous():
            raise ValueError(f"{name}: expected {size} adjacent elements, got shape {tuple(given.shape)}, strides "
                             f"{given.stride()}")  # fmt: skip
        if given.device != masks.words.device:
            raise ValueError(f"{name}: expected the device of the masks, {masks.words.device}, got {given.device}")
    check_device(values)
    _check_weights(weights, masks.clients, values.device)
    import triton

    from .kernels.aggregate import ELEMENTS, masked_mean_kernel

    out = torch.empty_like(old)
    if masks.size:
        with current(values.device):
            masked_mean_kernel[(triton.cdiv(masks.size, ELEMENTS),)](
                values, masks.words, masks.ranks, weights, old, out, masks.clients, masks.size, masks.words.shape[1],
                ELEMENTS=ELEMENTS, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _check(name: str, given: object, dtypes: torch.dtype | tuple[torch.dtype, ...], dimensions: int) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}")
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if given.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {given.dtype}")
    if given.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {tuple(given.shape)}")


def _check_weights(weights: Tensor, clients: int, device: torch.device) -> None:
    _check("weights", weights, torch.float64, 1)
    if clients == 0 or weights.shape[0] != clients:
        raise ValueError(f"weights: got {weights.shape[0]} for {clients} clients, expected one each and at least one")
    if weights.device != device or not weights.is_contiguous():
        raise ValueError(f"weights: expected adjacent elements on {device}, got {weights.device}, strides "
                         f"{weights.stride()}")  # fmt: skip
