# SPDX-License-Identifier: Apache-2.0
"""Merging on a CUDA device: :mod:`fedpai_kernels.aggregate` for a whole model's [clients, values], one launch each, and
the server's step after it.

The same formulas, in the same order, with the same bits. A set of masks is looked at once, as :class:`Positions`, and
then serves every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from ..aggregate import RULES, check_step
from . import library
from .arguments import check_apart, check_rows, check_state, check_tensor, check_weights

_INT32_LIMIT = 2**31


def weighted_mean(vectors: Tensor, weights: Sequence[float] | Tensor, *, compensated: bool = False) -> Tensor:
    """``sum_k weights[k] * vectors[k] / sum_k weights[k]``, sums in float64.

    Args:
        vectors: (clients, n), float32, on a CUDA device; rows without gaps are read in place.
        weights: finite and above 0, one a client. A float64 tensor on the device is not looked at, so nothing waits.
        compensated: also carry what each float64 addition rounds away.

    Returns:
        (n,), float32.

    Raises:
        TypeError, ValueError: what cannot be merged.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    rows = check_rows("vectors", vectors, torch.float32)
    with library.on(rows.device) as (cuda, stream):
        factors = check_weights(weights, rows.shape[0], rows.device)
        out = torch.empty(rows.shape[1], dtype=torch.float32, device=rows.device)
        cuda.call(
            "weighted_mean", rows.data_ptr(), rows.stride(0), factors.data_ptr(), *rows.shape, int(compensated),
            out.data_ptr(), stream,
        )  # fmt: skip
    return out


class Positions:
    """Clients' masks as positions in a vector of `n` elements, looked at and cut into segments once.

    Args:
        positions: for each client int32, ascending and without repeats, on one CUDA device.
        n: elements of the merged vector, below 2^31 - 1024.

    Raises:
        TypeError: what is not a tensor of int32.
        ValueError: no clients, tensors of several devices, or positions that cannot be.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """

    def __init__(self, positions: Sequence[Tensor], n: int) -> None:
        if len(positions) == 0:
            raise ValueError("positions: got none, expected at least one client's")
        if not 0 <= n < _INT32_LIMIT - 1024:
            raise ValueError(f"n: got {n}, expected 0 <= n < 2^31 - 1024")
        self.device = check_tensor("positions[0]", positions[0], torch.int32, 1).device
        for k, own in enumerate(positions):
            check_tensor(f"positions[{k}]", own, torch.int32, 1, self.device)
        self.n = n
        self.counts = [own.numel() for own in positions]
        self.at = torch.cat(list(positions))
        clients = len(positions)
        self.offsets = torch.tensor([0, *self.counts]).cumsum(0).to(self.device)
        with library.on(self.device) as (cuda, stream):
            self.begins = torch.empty(
                (cuda.segments(n) + 1) * clients, dtype=torch.int32, device=self.device
            )
            wrong = torch.empty(clients, dtype=torch.int32, device=self.device)
            cuda.call(
                "find_segments", self.at.data_ptr(), self.offsets.data_ptr(), clients, max(self.counts), n,
                self.begins.data_ptr(), wrong.data_ptr(), stream,
            )  # fmt: skip
        for k, is_wrong in enumerate(wrong.tolist()):
            if is_wrong:
                raise ValueError(f"positions[{k}]: expected ascending positions without repeats in [0, {n})")


def masked_mean(
    old: Tensor,
    values: Tensor,
    positions: Positions,
    weights: Sequence[float] | Tensor,
    *,
    compensated: bool = False,
) -> Tensor:
    """The weighted mean of each element over the clients that speak about it; ``old[j]`` where none does.

    Args:
        old: (positions.n,), float32.
        values: float32, those of all clients one behind the other, as many as there are positions.
        positions: where they belong.
        weights, compensated: as of :func:`weighted_mean`.

    Returns:
        (positions.n,), float32.

    Raises:
        TypeError, ValueError: what cannot be merged.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    before = check_tensor("old", old, torch.float32, 1, positions.device).contiguous()
    own = check_tensor("values", values, torch.float32, 1, positions.device).contiguous()
    if before.numel() != positions.n:
        raise ValueError(f"old: got {before.numel()} elements, expected the {positions.n} that positions are for")
    if own.numel() != sum(positions.counts):
        raise ValueError(f"values: got {own.numel()}, expected one for each of {sum(positions.counts)} positions")
    clients = len(positions.counts)
    with library.on(positions.device) as (cuda, stream):
        factors = check_weights(weights, clients, positions.device)
        out = torch.empty_like(before)
        cuda.call(
            "masked_mean", own.data_ptr(), positions.at.data_ptr(), positions.offsets.data_ptr(),
            positions.begins.data_ptr(), factors.data_ptr(), clients, before.data_ptr(), positions.n,
            int(compensated), out.data_ptr(), stream,
        )  # fmt: skip
    return out


def majority(bitmaps: Tensor, threshold: int) -> Tensor:
    """The bits that at least `threshold` of the bitmaps have set.

    Args:
        bitmaps: (clients, bytes), uint8, on a CUDA device, at most 65535 clients.
        threshold: 1 (the union) to the number of clients (the intersection).

    Returns:
        (bytes,), uint8.

    Raises:
        TypeError, ValueError: what cannot be counted.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    rows = check_rows("bitmaps", bitmaps, torch.uint8)
    clients, size = rows.shape
    if clients > 65535:
        raise ValueError(f"bitmaps: got {clients}, expected at most 65535")
    if not 1 <= threshold <= clients:
        raise ValueError(f"threshold: got {threshold}, expected 1 to {clients}, the number of bitmaps")
    with library.on(rows.device) as (cuda, stream):
        out = torch.empty(size, dtype=torch.uint8, device=rows.device)
        cuda.call("majority", rows.data_ptr(), rows.stride(0), clients, threshold, size, out.data_ptr(), stream)
    return out


def server_step(
    rule: str,
    old: Tensor,
    merged: Tensor,
    m: Tensor,
    v: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Tensor:
    """One step of a server optimiser from the old global model towards the merged one, as
    :func:`fedpai_kernels.aggregate.server_step` takes it: FedAvgM, FedAdam or FedYogi.

    Args:
        rule: "avgm", "adam" or "yogi".
        old, merged: (n,), float32, on one CUDA device.
        m, v: the optimiser's state, likewise, contiguous; changed in place. "avgm" has no v.
        lr, beta1, beta2, tau: the factors of that function.

    Returns:
        (n,), float32, the new global model.

    Raises:
        TypeError: what is not a tensor, or not float32.
        ValueError: an unknown rule, a v where the rule has none or the reverse, unequal lengths or devices, state that
            has gaps or shares memory with another argument, or a factor that cannot be.
        CudaUnavailableError: no CUDA kernels, or no driver.
    """
    check_step(rule, v, lr, beta1, beta2, tau)
    before = check_tensor("old", old, torch.float32, 1)
    others = {"merged": check_tensor("merged", merged, torch.float32, 1, before.device)}
    for name, state in (("m", m), ("v", v)):
        if name == "m" or state is not None:
            others[name] = check_state(name, check_tensor(name, state, torch.float32, 1, before.device))
    for name, tensor in others.items():
        if tensor.numel() != before.numel():
            raise ValueError(f"{name}: got {tensor.numel()} values, expected the {before.numel()} of old")
    check_apart({"old": before, **others}, changed=("m", "v"))
    return _launched_step(rule, before, others["merged"], m, v, (lr, beta1, beta2, tau))


def _launched_step(
    rule: str, old: Tensor, merged: Tensor, m: Tensor, v: Tensor | None, factors: tuple[float, ...]
) -> Tensor:
    old, merged = old.contiguous(), merged.contiguous()
    with library.on(old.device) as (cuda, stream):
        out = torch.empty_like(old)
        cuda.call(
            "server_step", byref(library.ServerStep(*factors, RULES.index(rule))), old.data_ptr(), merged.data_ptr(),
            m.data_ptr(), None if v is None else v.data_ptr(), old.numel(), out.data_ptr(), stream,
        )  # fmt: skip
    return out
