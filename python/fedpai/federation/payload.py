# SPDX-License-Identifier: Apache-2.0
"""The message format: what travels between a server and its clients, as bytes.

One buffer, little-endian, no padding:

    magic 4s "FPAI" | version u16 | kind u8 | dtype u8 | round u32 | client u32 | examples i64
    model digest 32s | mask digest 32s | count u64 | ints u32 | crc32 u32        (header, 104 bytes)
    count elements of the dtype                                                 (values)
    ints elements of int64                                                      (integer buffers)

The checksum covers the whole buffer except its own four bytes. `decode` checks a buffer against itself,
`Payload.expect` checks it against what the receiver waits for; both raise `PayloadError` and neither
allocates by a length that the sender claims. The checksum catches damage, not forgery.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from fedpai.federation.layout import Floats, Ints

MAGIC = b"FPAI"
VERSION = 1
SERVER = 0xFFFFFFFF
"""The `client` field of a message that the server sent."""
NO_MASK = bytes(32)
"""The mask digest of a dense message."""

_HEADER = struct.Struct("<4sHBBIIq32s32sQII")
HEADER_BYTES = _HEADER.size
_CRC_AT = HEADER_BYTES - 4


class PayloadError(ValueError):
    """A message that is damaged, stale, or meant for another model or mask. Nothing was changed by it."""


class Kind(IntEnum):
    """What a message carries."""

    VALUES = 1
    """The model: packed weights under the mask, the other floats, the integer buffers."""
    MASK = 2
    """A bitmap over all conv and linear weights."""
    SCORES = 3
    """One saliency score for each conv and linear weight."""
    THRESHOLDS = 4
    """One threshold for each output channel of every conv and linear layer."""


class DType(IntEnum):
    """How the elements are stored."""

    FLOAT32 = 0
    BITS = 1

    def size_of(self, count: int) -> int:
        """Bytes that `count` elements take."""
        return (count + 7) // 8 if self is DType.BITS else 4 * count


_DTYPE_OF = {
    Kind.VALUES: DType.FLOAT32,
    Kind.MASK: DType.BITS,
    Kind.SCORES: DType.FLOAT32,
    Kind.THRESHOLDS: DType.FLOAT32,
}


@dataclass(frozen=True)
class Payload:
    """A decoded message. `values` is a read-only view for float kinds; `bits` holds a mask's bitmap."""

    kind: Kind
    round: int
    client: int
    examples: int
    model_digest: bytes
    mask_digest: bytes
    count: int
    values: Floats = field(repr=False)
    ints: Ints = field(repr=False)
    bits: bytes = field(repr=False, default=b"")

    def expect(
        self,
        *,
        kind: Kind,
        round: int,
        client: int,
        model_digest: bytes,
        count: int,
        mask_digest: bytes | None = None,
        ints: int = 0,
    ) -> Payload:
        """Returns itself if it is the message that was waited for.

        Args:
            kind, round, client, model_digest, count, ints: what each field must be.
            mask_digest: what it must be; None accepts any (the message itself brings a new mask).

        Raises:
            PayloadError: naming the first field that differs, what came and what was expected. A client's
                message must also claim at least one example.
        """
        _same("kind", self.kind.name, kind.name)
        _same("round", self.round, round)
        _same("client", _who(self.client), _who(client))
        _same("model digest", self.model_digest.hex()[:16], model_digest.hex()[:16])
        _same("model digest", self.model_digest, model_digest)
        if mask_digest is not None:
            _same("mask digest", self.mask_digest.hex()[:16], mask_digest.hex()[:16])
            _same("mask digest", self.mask_digest, mask_digest)
        _same("number of values", self.count, count)
        _same("number of integers", int(self.ints.size), ints)
        if self.client != SERVER and self.examples < 1:
            raise PayloadError(
                f"payload from client {self.client} claims {self.examples} examples, expected >= 1"
            )
        return self


def encode(
    kind: Kind,
    *,
    round: int,
    client: int,
    examples: int,
    model_digest: bytes,
    mask_digest: bytes,
    values: Floats | None = None,
    ints: Ints | None = None,
    bits: bytes = b"",
    count: int | None = None,
) -> bytes:
    """Builds one message.

    Args:
        values: float32 vector of a VALUES or SCORES message.
        ints: int64 integer buffers of a VALUES message.
        bits, count: bitmap of a MASK message and its number of bits.
    """
    dtype = _DTYPE_OF[kind]
    if dtype is DType.BITS:
        body = bits
        total = 8 * len(bits) if count is None else count
    else:
        vector = np.zeros(0, np.float32) if values is None else values
        body = np.ascontiguousarray(vector, "<f4").tobytes()
        total = vector.size
    tail = b"" if ints is None else np.ascontiguousarray(ints, "<i8").tobytes()
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        kind,
        dtype,
        round,
        client,
        examples,
        model_digest,
        mask_digest,
        total,
        len(tail) // 8,
        0,
    )
    buffer = bytearray(head + body + tail)
    struct.pack_into("<I", buffer, _CRC_AT, _checksum(buffer))
    return bytes(buffer)


def decode(buffer: bytes | bytearray | memoryview) -> Payload:
    """Reads one message and checks it against itself.

    Raises:
        PayloadError: wrong magic, version, kind, dtype, length, checksum, or values that are not finite.
    """
    view = memoryview(buffer)
    if len(view) < HEADER_BYTES:
        raise PayloadError(f"payload of {len(view)} bytes is shorter than its {HEADER_BYTES}-byte header")
    (magic, version, kind_code, dtype_code, round_, client, examples, model, mask, count, ints, crc) = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise PayloadError(f"payload starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise PayloadError(f"payload has format version {version}, this program reads version {VERSION}")
    try:
        kind = Kind(kind_code)
    except ValueError:
        raise PayloadError(
            f"payload kind {kind_code} is unknown, expected one of {[int(k) for k in Kind]}"
        ) from None
    dtype = _DTYPE_OF[kind]
    if dtype_code != dtype:
        raise PayloadError(
            f"payload dtype {dtype_code} does not fit a {kind.name} message, expected {int(dtype)}"
        )
    body = dtype.size_of(count)
    wanted = HEADER_BYTES + body + 8 * ints
    if len(view) != wanted:
        state = "truncated" if len(view) < wanted else "oversized"
        raise PayloadError(f"payload is {state}: {len(view)} bytes, its header announces {wanted}")
    if crc != _checksum(view):
        raise PayloadError(
            f"payload checksum is {_checksum(view):08x}, its header says {crc:08x}: damaged on the way"
        )
    integers = np.frombuffer(view, "<i8", ints, HEADER_BYTES + body).astype(np.int64)
    if dtype is DType.BITS:
        bits = bytes(view[HEADER_BYTES : HEADER_BYTES + body])
        values = np.zeros(0, np.float32)
    else:
        bits = b""
        values = np.frombuffer(view, "<f4", count, HEADER_BYTES).astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise PayloadError(
                f"payload holds {int(count - finite.sum())} values that are not finite, "
                f"the first is {values[bad]} at position {bad}"
            )
        values.setflags(write=False)
    return Payload(kind, round_, client, examples, model, mask, count, values, integers, bits)


def _checksum(buffer: bytes | bytearray | memoryview) -> int:
    view = memoryview(buffer)
    return zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[:_CRC_AT]))


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise PayloadError(f"payload {what} is {got!r}, expected {expected!r}")


def _who(client: int) -> str:
    return "server" if client == SERVER else str(client)
