# SPDX-License-Identifier: Apache-2.0
"""How the content of a message becomes bytes: floats in 32 or 16 bits, masks as bitmaps or gaps, deflate.

All entropy coding is deflate (RFC 1951, without zlib's wrapper), whose Huffman codes come near the entropy of a
random mask once the mask is written as gaps. Everything here is exact but `rounded`. What cannot be decoded raises
`PayloadError`, and nothing is unpacked beyond the size that the caller gives.
"""

from __future__ import annotations

import zlib
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch

from fedpai.federation.layout import Floats, Ints

ESCAPE = 255
"""In a list of gaps: 255 dropped weights, and the gap goes on."""
_RAW_DEFLATE = -15
_LEVEL = 6
_STRATEGIES = (zlib.Z_RLE, zlib.Z_FILTERED)
"""The first wins on random masks and on floats, the second on masks that repeat themselves, such as blocks."""


class PayloadError(ValueError):
    """A message that is damaged, stale, or meant for another model or mask. Nothing was changed by it."""


class DType(IntEnum):
    """How the elements are stored."""

    FLOAT32 = 0
    BITS = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT16 = 4


class Coding(IntEnum):
    """How the stored elements are coded."""

    PLAIN = 0
    """As they are."""
    DEFLATE = 1
    """A bitmap deflated; or floats deflated, first byte of all elements, then second byte, and so on."""
    GAPS = 2
    """A mask as the deflated list of gaps between kept weights."""


_HALF = {DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}
SHORT = frozenset({*_HALF, DType.INT16})
"""Dtypes of 16 bits, which may have float32 values beside them."""


def rounded(values: Floats, dtype: DType) -> Floats:
    """The values as their receiver will see them: float32 again, each rounded to the nearest even of the dtype.

    Raises:
        PayloadError: a value that is not finite, or beyond the dtype's range (fp16: 65504), naming the first; of INT16,
            one that is no integer.
    """
    return values if dtype is DType.FLOAT32 else _widen(_narrow(values, dtype), dtype)


def pack_floats(values: Floats, dtype: DType, exact: int, deflate: bool) -> tuple[Coding, bytes]:
    """Float32 values as bytes, deflated if that is asked for and shorter.

    Args:
        exact: so many values at the end stay float32, whatever the dtype.

    Raises:
        PayloadError: see `rounded`.
    """
    split = values.size - exact
    weights = values[:split].astype("<f4") if dtype is DType.FLOAT32 else _narrow(values[:split], dtype).astype("<i2")
    parts = (weights, values[split:].astype("<f4"))
    plain = b"".join(part.tobytes() for part in parts)
    if deflate:
        planes = b"".join(part.view(np.uint8).reshape(-1, part.itemsize).T.tobytes() for part in parts)
        short = _deflated(planes, zlib.Z_RLE)
        if len(short) < len(plain):
            return Coding.DEFLATE, short
    return Coding.PLAIN, plain


def unpack_floats(body: memoryview, coding: Coding, dtype: DType, count: int, exact: int) -> Floats:
    """The inverse of `pack_floats`: read-only float32 values, `count` of them.

    Raises:
        PayloadError: a body of another size, or a value that is not finite.
    """
    split, width = count - exact, 4 if dtype is DType.FLOAT32 else 2
    stored = width * split + 4 * exact
    if coding is Coding.DEFLATE:
        planes = np.frombuffer(_inflated(body, stored, stored), np.uint8)
        parts = (planes[: width * split].reshape(width, -1), planes[width * split :].reshape(4, -1))
        body = memoryview(b"".join(part.T.tobytes() for part in parts))
    elif len(body) != stored:
        raise PayloadError(f"payload body has {len(body)} bytes, its {count} values take {stored}")
    if dtype is DType.FLOAT32:
        values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
    else:
        halves = _widen(np.frombuffer(body, "<i2", split), dtype)
        values = np.concatenate((halves, np.frombuffer(body, "<f4", exact, width * split))).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise PayloadError(
            f"payload holds {int(count - finite.sum())} values that are not finite, "
            f"the first is {values[bad]} at position {bad}"
        )
    values.setflags(write=False)
    return values


@lru_cache(maxsize=4)  # a server sends one mask to many clients
def pack_mask(bits: bytes) -> tuple[Coding, bytes]:
    """A bitmap as bytes, in whichever form is shortest.

    Gaps are tried where fewer weights are kept than the bitmap has bytes, so that the work stays below the bitmap's
    size; a denser bitmap is deflated as it is, and comes as near to its entropy.
    """
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))
    sparse = positions.size < len(bits)
    raw = _gaps(positions) if sparse else bits
    short = min((_deflated(raw, strategy) for strategy in _STRATEGIES), key=len)
    if len(short) >= len(bits):
        return Coding.PLAIN, bits
    return Coding.GAPS if sparse else Coding.DEFLATE, short


def unpack_mask(body: memoryview, coding: Coding, count: int) -> bytes:
    """The inverse of `pack_mask`: a bitmap of `count` bits.

    Raises:
        PayloadError: a body of another size, or gaps that lead beyond the last weight or to none.
    """
    size = (count + 7) // 8
    if coding is Coding.GAPS:
        positions = _positions(np.frombuffer(_inflated(body, 0, count), np.uint8), count)
        flags = np.zeros(count, np.bool_)
        flags[positions] = True
        return np.packbits(flags).tobytes()
    if coding is Coding.DEFLATE:
        return _inflated(body, size, size)
    if len(body) != size:
        raise PayloadError(f"payload body has {len(body)} bytes, a bitmap of {count} bits takes {size}")
    return bytes(body)


def _narrow(values: Floats, dtype: DType) -> np.ndarray:
    """Bit patterns (int16) of the values, rounded to nearest even; those of INT16 must be integers already."""
    if dtype is DType.INT16:
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int16)
        if not np.array_equal(whole, values):
            bad = int(np.argmax(whole != values))
            raise PayloadError(f"{values[bad]} at position {bad} cannot be sent as INT16")
        return whole
    half = torch.tensor(values).to(_HALF[dtype])
    finite = torch.isfinite(half).numpy()
    if not finite.all():
        bad, largest = int(np.argmin(finite)), torch.finfo(half.dtype).max
        raise PayloadError(
            f"{int(finite.size - finite.sum())} values cannot be sent as {dtype.name}, whose largest is {largest:.6g}: "
            f"the first is {values[bad]} at position {bad}"
        )
    return half.view(torch.int16).numpy()


def _widen(stored: np.ndarray, dtype: DType) -> Floats:
    if dtype is DType.INT16:
        return stored.astype(np.float32)
    return torch.from_numpy(stored.astype(np.int16)).view(_HALF[dtype]).float().numpy()


def _gaps(positions: Ints) -> bytes:
    """Ascending positions as bytes: before each kept weight the number of dropped ones, 255 at a time."""
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // ESCAPE
    out = np.full(gaps.size + int(escapes.sum()), ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = gaps % ESCAPE
    return out.tobytes()


def _positions(gaps: np.ndarray, count: int) -> Ints:
    """The inverse of `_gaps`. Gaps cannot be negative, so no position comes twice."""
    ends = gaps != ESCAPE
    if gaps.size and not ends[-1]:
        raise PayloadError("payload mask ends in dropped weights, expected a kept one")
    positions = np.cumsum(gaps, dtype=np.int64)[ends]
    positions += np.arange(positions.size)
    if positions.size and positions[-1] >= count:
        raise PayloadError(f"payload mask keeps weight {positions[-1]}, the last one is {count - 1}")
    return positions


def _deflated(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW_DEFLATE, zlib.DEF_MEM_LEVEL, strategy)
    return coder.compress(data) + coder.flush()


def _inflated(body: memoryview, least: int, most: int) -> bytes:
    """Inflates to a size in [least, most]; stops one byte beyond, however much the body would give."""
    coder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        data = coder.decompress(body, most + 1)
    except zlib.error as error:
        raise PayloadError(f"payload body cannot be inflated: {error}") from None
    if len(data) > most:
        raise PayloadError(f"payload body inflates to more than the {most} bytes it may have")
    if not coder.eof:
        raise PayloadError(f"payload body is cut off: it inflates to {len(data)} bytes and does not end")
    if len(data) < least:
        raise PayloadError(f"payload body inflates to {len(data)} bytes, expected {least}")
    if coder.unused_data:
        raise PayloadError(f"payload body has {len(coder.unused_data)} bytes after its end")
    return data
