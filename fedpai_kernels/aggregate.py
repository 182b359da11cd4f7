# SPDX-License-Identifier: Apache-2.0
"""Merging on a federation's server: means of clients' vectors, votes about masks, and the server's optimisers.

    merged = aggregate.weighted_mean(vectors, examples)                      one mask for all, or none
    merged = aggregate.masked_mean(old, vectors, positions, examples)        each client under its own mask
    kept = aggregate.majority(bitmaps, threshold)                            which weights enough clients keep
    new = aggregate.server_step("adam", old, merged, m, v, lr=0.1, beta1=0.9)

Everything is one pass over memory, shared by as many threads as torch uses. Each element is computed by itself and its
sums run over the clients in the given order, in float64 unless said otherwise, so the bits of a result depend on the
operands and on nothing else: neither on the number of threads nor on the instruction set.

Vectors are one-dimensional float32 arrays of numpy or CPU tensors of torch; results are what the first one is. An
array that is not contiguous or not aligned is copied first. NaN and infinities go through the arithmetic as they are;
compensated, an infinity becomes NaN.

Means, votes and steps of tensors on one CUDA device are computed there, with the same bits
(:mod:`fedpai_kernels.cuda`, whose functions take matrices of clients without the copy into one that these make). A
matrix (clients, n) may stand for a sequence of its rows, and is not copied. Without the CUDA kernels that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _C

__all__ = ["majority", "masked_mean", "server_step", "weighted_mean"]

Array = TypeVar("Array", npt.NDArray[Any], Tensor)
RULES = ("avgm", "adam", "yogi")
"""Server optimisers: FedAvgM, FedAdam, FedYogi."""


def weighted_mean(vectors: Sequence[Array], weights: Sequence[float], *, compensated: bool = False) -> Array:
    """``sum_k weights[k] * vectors[k] / sum_k weights[k]``, element by element.

    Args:
        vectors: float32, of one length, at least one.
        weights: finite and above 0, one a vector. Equal ones give the plain mean. While they are whole numbers below
            2^29, products are exact.
        compensated: also carry what each float64 addition rounds away (TwoSum), so that even sums that cancel are exact
            to twice the digits.

    Returns:
        float32, each element rounded once.

    Raises:
        TypeError: what is not an array, or not float32.
        ValueError: no vectors, unequal lengths, or a weight that cannot be.
    """
    if _are_on_cuda(vectors):
        rows = _rows("vectors", vectors, torch.float32)
        return _cuda().weighted_mean(rows, checked_weights(weights, len(rows)), compensated=compensated)
    own = [_vector(f"vectors[{k}]", vector, np.float32) for k, vector in enumerate(vectors)]
    factors = checked_weights(weights, len(own))
    for k, vector in enumerate(own):
        if vector.size != own[0].size:
            raise ValueError(
                f"vectors[{k}]: {vector.size} values and the {own[0].size} of vectors[0] cannot be averaged"
            )
    out = np.empty(own[0].size, np.float32)
    addresses = [_address(vector) for vector in own]
    _C.weighted_mean(addresses, factors, out.size, compensated, _address(out), torch.get_num_threads())
    return _like(vectors[0], out)


def masked_mean(
    old: Array,
    vectors: Sequence[Array],
    positions: Sequence[Array],
    weights: Sequence[float],
    *,
    compensated: bool = False,
) -> Array:
    """The weighted mean of each element over the vectors that speak about it.

    With ``m_kj`` 1 where position j is in ``positions[k]``, else 0, and ``w_kj`` the value given for it:
    ``sum_k weights[k] m_kj w_kj / sum_k weights[k] m_kj``, or ``old[j]`` where no vector speaks about j.

    Args:
        old: float32.
        vectors: float32, at least one, of any lengths.
        positions: int32, as many as the vector has values: where in `old` they belong, ascending and without
            repeats. int64 is taken too, but checked and converted first, which takes longer than the mean.
        weights: as of `weighted_mean`.
        compensated: as of `weighted_mean`.

    Returns:
        float32 of the length of `old`, each element rounded once.

    Raises:
        TypeError: what is not an array, or of another dtype.
        ValueError: no vectors, lengths that do not fit, positions that cannot be, or a weight that cannot be.
    """
    if _are_on_cuda(vectors):
        return _masked_mean_on_cuda(old, vectors, positions, weights, compensated)
    before = _vector("old", old, np.float32)
    own = [_vector(f"vectors[{k}]", vector, np.float32) for k, vector in enumerate(vectors)]
    factors = checked_weights(weights, len(own))
    if len(positions) != len(own):
        raise ValueError(f"positions: got {len(positions)} arrays for {len(own)} vectors")
    at = [_positions(f"positions[{k}]", places, before.size) for k, places in enumerate(positions)]
    for k, (vector, places) in enumerate(zip(own, at, strict=True)):
        if vector.size != places.size:
            raise ValueError(f"positions[{k}]: got {places.size} for the {vector.size} values of vectors[{k}]")
    out = np.empty(before.size, np.float32)
    wrong = _C.masked_mean(
        [_address(vector) for vector in own], [_address(places) for places in at], [vector.size for vector in own],
        factors, _address(before), out.size, compensated, _address(out), torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise ValueError(_out_of_order(wrong, before.size))
    return _like(old, out)


def majority(bitmaps: Sequence[Array], threshold: int) -> Array:
    """The bits that at least `threshold` of the bitmaps have set.

    Args:
        bitmaps: uint8, of one length, at least one; eight positions a byte, in any order that they share.
        threshold: 1 (the union) to the number of bitmaps (the intersection).

    Returns:
        uint8, a bitmap of the same length.

    Raises:
        TypeError: what is not an array, or not uint8.
        ValueError: no bitmaps, unequal lengths, or a threshold that cannot be.
    """
    if _are_on_cuda(bitmaps):
        return _cuda().majority(_rows("bitmaps", bitmaps, torch.uint8), threshold)
    own = [_vector(f"bitmaps[{k}]", bitmap, np.uint8) for k, bitmap in enumerate(bitmaps)]
    if not own:
        raise ValueError("bitmaps: got none, expected at least one")
    if not 1 <= threshold <= len(own):
        raise ValueError(f"threshold: got {threshold}, expected 1 to {len(own)}, the number of bitmaps")
    for k, bitmap in enumerate(own):
        if bitmap.size != own[0].size:
            raise ValueError(f"bitmaps[{k}]: got {bitmap.size} bytes, expected the {own[0].size} of bitmaps[0]")
    out = np.empty(own[0].size, np.uint8)
    addresses = [_address(bitmap) for bitmap in own]
    _C.majority(addresses, threshold, out.size, _address(out), torch.get_num_threads())
    return _like(bitmaps[0], out)


def server_step(
    rule: str,
    old: Array,
    merged: Array,
    m: Array,
    v: Array | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Array:
    """One step of a server optimiser from the old global model towards the merged one.

    With ``delta = merged - old``, in float32:

        avgm   m = beta1 * m + delta                   new = old + lr * m
        adam   m = beta1 * m + (1 - beta1) * delta     v = beta2 * v + (1 - beta2) * delta^2
        yogi   m likewise                              v = v - (1 - beta2) * delta^2 * sign(v - delta^2)
               both                                    new = old + lr * m / (sqrt(v) + tau)

    FedAvgM is that of Hsu, Qi and Brown (arXiv 1909.06335) with a learning rate of the server; FedAdam and FedYogi are
    Algorithm 2 of Reddi et al. (arXiv 2003.00295), without bias correction. There m starts at 0 and v at tau^2 or more.

    Args:
        rule: one of `RULES`.
        old, merged: float32, of one length.
        m, v: the optimiser's state, float32, of the same length; changed in place. "avgm" has no v.
        lr, beta1, beta2, tau: as above.

    Returns:
        float32, the new global model.

    Raises:
        TypeError: what is not an array, or not float32.
        ValueError: an unknown rule, a v where the rule has none or the reverse, unequal lengths, state that cannot be
            changed in place or shares memory with another argument, or a factor that cannot be.
    """
    check_step(rule, v, lr, beta1, beta2, tau)
    if _are_on_cuda([old]):
        return _cuda().server_step(rule, old, merged, m, v, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    arrays = {"old": _vector("old", old, np.float32), "merged": _vector("merged", merged, np.float32)}
    arrays["m"] = _state("m", m)
    if v is not None:
        arrays["v"] = _state("v", v)
    for name, array in arrays.items():
        if array.size != arrays["old"].size:
            raise ValueError(f"{name}: got {array.size} values, expected the {arrays['old'].size} of old")
        for other in {"m", "v"} & arrays.keys() - {name}:
            if np.may_share_memory(array, arrays[other]):
                raise ValueError(f"{other}: it is changed in place, so it must share no memory with {name}")
    out = np.empty(arrays["old"].size, np.float32)
    address_of_v = _address(arrays["v"]) if v is not None else 0
    _C.server_step(
        RULES.index(rule), _address(arrays["old"]), _address(arrays["merged"]), _address(arrays["m"]), address_of_v,
        out.size, lr, beta1, beta2, tau, _address(out), torch.get_num_threads(),
    )  # fmt: skip
    return _like(old, out)


def check_step(rule: str, v: object, lr: float, beta1: float, beta2: float, tau: float) -> None:
    """A rule of a server's step, whether it has a v, and its factors.

    Raises:
        ValueError: one of them cannot be.
    """
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
    if (v is None) != (rule == "avgm"):
        raise ValueError(f"v: got {'none' if v is None else 'one'}, the reverse of what rule {rule!r} has")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: got {lr}, expected a finite number above 0")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: got {beta}, expected 0 <= {name} < 1")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau: got {tau}, expected a finite number above 0")


# ---- on a CUDA device -----------------------------------------------------------------------------------


def _cuda() -> Any:
    """The functions for CUDA tensors, which know this module."""
    from .cuda import aggregate

    return aggregate


def _are_on_cuda(vectors: Sequence[Any]) -> bool:
    return len(vectors) > 0 and isinstance(vectors[0], Tensor) and vectors[0].is_cuda


def _rows(name: str, vectors: Any, dtype: torch.dtype) -> Tensor:
    """Vectors of one device as the rows of a matrix."""
    if isinstance(vectors, Tensor) and vectors.dim() == 2:
        return vectors
    own = _on_one_device(name, vectors, dtype)
    for k, vector in enumerate(own):
        if vector.numel() != own[0].numel():
            sizes = f"{vector.numel()} elements and the {own[0].numel()} of {name}[0]"
            raise ValueError(f"{name}[{k}]: {sizes} cannot be merged")
    return torch.stack(own)


def _on_one_device(name: str, vectors: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    from .cuda.arguments import check_tensor

    return [check_tensor(f"{name}[{k}]", vector, dtype, 1, vectors[0].device) for k, vector in enumerate(vectors)]


def _masked_mean_on_cuda(
    old: Any, vectors: Sequence[Any], positions: Sequence[Any], weights: Sequence[float], compensated: bool
) -> Any:
    own = _on_one_device("vectors", vectors, torch.float32)
    factors = checked_weights(weights, len(own))
    if len(positions) != len(own):
        raise ValueError(f"positions: got {len(positions)} arrays for {len(own)} vectors")
    for k, (vector, places) in enumerate(zip(own, positions, strict=True)):
        if vector.numel() != len(places):
            raise ValueError(f"positions[{k}]: got {len(places)} for the {vector.numel()} values of vectors[{k}]")
    at = _cuda().Positions(list(positions), len(old))
    return _cuda().masked_mean(old, torch.cat(own), at, factors, compensated=compensated)


# ---- arguments ------------------------------------------------------------------------------------------


def _plain(name: str, given: object, dtypes: tuple[type[np.generic], ...]) -> npt.NDArray[Any]:
    """A vector as it lies, as an array of numpy."""
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            raise ValueError(f"{name}: got a tensor on {given.device}, expected one on the CPU")
        given = given.detach().numpy()
    if not isinstance(given, np.ndarray):
        raise TypeError(f"{name}: got {type(given).__name__}, expected an array or a tensor of {_either(dtypes)}")
    if given.dtype.type not in dtypes or not given.dtype.isnative:
        raise TypeError(f"{name}: got {given.dtype}, expected {_either(dtypes)}")
    if given.ndim != 1:
        raise ValueError(f"{name}: got {given.ndim} dimensions, expected one")
    return given


def _either(dtypes: tuple[type[np.generic], ...]) -> str:
    return " or ".join(np.dtype(dtype).name for dtype in dtypes)


def _vector(name: str, given: object, *dtypes: type[np.generic]) -> npt.NDArray[Any]:
    """A vector that the kernels can read: a copy where it is not contiguous or not aligned."""
    found = _plain(name, given, dtypes)
    flags = found.flags
    return found if flags.c_contiguous and flags.aligned else found.copy()


def _state(name: str, given: object) -> npt.NDArray[np.float32]:
    """A vector that is changed in place, so nothing may be copied."""
    found = _plain(name, given, (np.float32,))
    if not (found.flags.c_contiguous and found.flags.aligned and found.flags.writeable):
        raise ValueError(f"{name}: it is changed in place, so it must be contiguous, aligned and writable")
    return found


def _positions(name: str, given: object, size: int) -> npt.NDArray[np.int32]:
    """Positions into a vector of so many elements, as int32. Their order is checked by the kernel."""
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"old: got {size} elements, expected fewer than 2^31")
    found = _vector(name, given, np.int32, np.int64)
    if found.dtype == np.int64 and found.size and not 0 <= int(found.min()) <= int(found.max()) < size:
        raise ValueError(f"{name}: expected positions in [0, {size}), got {found.min()} to {found.max()}")
    return found.astype(np.int32, copy=False)


def _out_of_order(client: int, size: int) -> str:
    return f"positions[{client}]: expected ascending positions without repeats in [0, {size})"


def checked_weights(weights: Sequence[float], vectors: int) -> list[float]:
    """The weights of so many vectors.

    Raises:
        ValueError: no vectors, another number of weights, or one that is not finite and above 0.
    """
    if vectors == 0:
        raise ValueError("vectors: got none, expected at least one")
    if len(weights) != vectors:
        raise ValueError(f"weights: got {len(weights)} for {vectors} vectors")
    found = [float(weight) for weight in weights]
    for k, weight in enumerate(found):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights[{k}]: got {weights[k]}, expected a finite number above 0")
    return found


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _like(model: Array, result: npt.NDArray[Any]) -> Array:
    """The result as a tensor, where the argument is one."""
    return torch.from_numpy(result) if isinstance(model, Tensor) else result
