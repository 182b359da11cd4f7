# SPDX-License-Identifier: Apache-2.0
"""The message format: what travels between a server and its clients, as bytes.

One buffer, little-endian: a header of 120 bytes, the body, the integer buffers. docs/wire.md has the layout byte by
byte, `coding` says how a body is stored and coded.

The checksum covers the whole buffer except its own four bytes. `decode` checks a buffer against itself,
`Payload.expect` checks it against what the receiver waits for; both raise `PayloadError`. Memory is bounded by the
buffer's length and by the count that the receiver allows, never by what the sender claims. The checksum catches
damage, not forgery.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from fedpai.federation.coding import (
    SHORT,
    Coding,
    DType,
    PayloadError,
    pack_floats,
    pack_mask,
    unpack_floats,
    unpack_mask,
)
from fedpai.federation.layout import Floats, Ints

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "MOST",
    "NO_MASK",
    "SCORE_DTYPES",
    "SERVER",
    "VERSION",
    "WIRE_DTYPES",
    "Coding",
    "DType",
    "Kind",
    "Payload",
    "PayloadError",
    "decode",
    "encode",
]

MAGIC = b"FPAI"
VERSION = 3
SERVER = 0xFFFFFFFF
"""The `client` field of a message that the server sent."""
NO_MASK = bytes(32)
"""The mask digest of a dense message."""
MOST = 1 << 28
"""Elements that `decode` takes where it is not told the size of the receiver's model."""
SCORE_DTYPES = {"exact": DType.FLOAT32, "coarse": DType.INT16}
"""How a SCORES message stores them, by the run's setting `scores`."""
WIRE_DTYPES = {"fp32": DType.FLOAT32, "bf16": DType.BFLOAT16, "fp16": DType.FLOAT16}
"""How the weights of a VALUES message are stored, by the run's setting `wire`."""
MOST_EXAMPLES = 1 << 29
"""A client claims fewer examples: products of counts and values are exact in float64 then."""

_START = struct.Struct("<4sH")
_HEADER = struct.Struct("<4sHBBB3sIIIq32s32sQQII")
HEADER_BYTES = _HEADER.size
_CRC_AT = HEADER_BYTES - 4


class Kind(IntEnum):
    """What a message carries."""

    VALUES = 1
    """The model: packed weights under the mask, the other floats, the integer buffers."""
    MASK = 2
    """A bitmap over all conv and linear weights."""
    SCORES = 3
    """One saliency score for each conv and linear weight; in INT16, multiples of a step that comes last."""
    THRESHOLDS = 4
    """One threshold for each output channel of every conv and linear layer."""


_DTYPES_OF = {
    Kind.VALUES: frozenset(WIRE_DTYPES.values()),
    Kind.MASK: frozenset({DType.BITS}),
    Kind.SCORES: frozenset(SCORE_DTYPES.values()),
    Kind.THRESHOLDS: frozenset({DType.FLOAT32}),
}


@dataclass(frozen=True)
class Payload:
    """A decoded message.

    Attributes:
        kind, dtype: what it carries, and how that was stored.
        round, client, examples: when, from whom, and for how many examples it speaks.
        model_digest, mask_digest: 32 bytes each.
        count, exact: number of elements, and how many of them at the end were stored in float32 beside a 16-bit dtype.
        values: read-only float32 of the float kinds.
        ints: int64 integer buffers.
        bits: bitmap of a MASK message, however it was coded.
    """

    kind: Kind
    dtype: DType
    round: int
    client: int
    examples: int
    model_digest: bytes
    mask_digest: bytes
    count: int
    exact: int
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
        dtype: DType | None = None,
        exact: int = 0,
    ) -> Payload:
        """Returns itself if it is the message that was waited for.

        Args:
            kind, round, client, model_digest, count, ints: what each field must be.
            mask_digest: what it must be; None accepts any (the message itself brings a new mask).
            dtype: what it must be; None accepts any that the kind may have.
            exact: what it must be under a 16-bit dtype.

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
        if dtype is not None:
            _same("dtype", self.dtype.name, dtype.name)
        if self.dtype in SHORT:
            _same("number of float32 values", self.exact, exact)
        if self.client != SERVER and self.examples >= MOST_EXAMPLES:
            raise PayloadError(
                f"payload from client {self.client} claims {self.examples} examples, expected < {MOST_EXAMPLES}"
            )
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
    dtype: DType = DType.FLOAT32,
    exact: int = 0,
    deflate: bool = False,
) -> bytes:
    """Builds one message.

    Args:
        values: float32 vector of a VALUES, SCORES or THRESHOLDS message.
        ints: int64 integer buffers of a VALUES message.
        bits, count: bitmap of a MASK message and its number of bits; coded in the shortest form.
        dtype: how values are stored; a float of 16 bits rounds them to nearest even, INT16 takes integers only.
        exact: so many values at the end stay float32 under a 16-bit dtype.
        deflate: code the values, where that makes them shorter.

    Raises:
        PayloadError: a value that a 16-bit dtype cannot hold.
    """
    if kind is Kind.MASK:
        dtype, exact = DType.BITS, 0
        total = 8 * len(bits) if count is None else count
        coding, body = pack_mask(bits)
    else:
        vector = np.zeros(0, np.float32) if values is None else values
        exact = 0 if dtype is DType.FLOAT32 else exact
        total = vector.size
        coding, body = pack_floats(vector, dtype, exact, deflate)
    tail = b"" if ints is None else np.ascontiguousarray(ints, "<i8").tobytes()
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        kind,
        dtype,
        coding,
        b"",
        round,
        client,
        exact,
        examples,
        model_digest,
        mask_digest,
        total,
        len(body),
        len(tail) // 8,
        0,
    )
    buffer = bytearray(head + body + tail)
    struct.pack_into("<I", buffer, _CRC_AT, _checksum(buffer))
    return bytes(buffer)


def decode(buffer: bytes | bytearray | memoryview, most: int = MOST) -> Payload:
    """Reads one message and checks it against itself.

    Args:
        most: largest count that is decoded; a receiver passes the size of its dense model.

    Raises:
        PayloadError: wrong magic, version, kind, dtype, coding, count, length or checksum, a body that does not
            decode to what the header announces, or values that are not finite.
    """
    view = memoryview(buffer)
    _check_start(view)
    (
        _magic,
        _version,
        kind_code,
        dtype_code,
        coding_code,
        zeros,
        round_,
        client,
        exact,
        examples,
        model,
        mask,
        count,
        body_bytes,
        ints,
        crc,
    ) = _HEADER.unpack_from(view)
    kind, dtype, coding = _read_codes(kind_code, dtype_code, coding_code)
    if zeros != bytes(3):
        raise PayloadError(f"payload has {zeros.hex()} where its header must be 0")
    if count > most:
        raise PayloadError(f"payload announces {count} elements, the receiver takes at most {most}")
    if exact > (count if dtype in SHORT else 0):
        raise PayloadError(f"payload announces {exact} float32 values beside {dtype.name}, among {count} in all")
    wanted = HEADER_BYTES + body_bytes + 8 * ints
    if len(view) != wanted:
        state = "truncated" if len(view) < wanted else "oversized"
        raise PayloadError(f"payload is {state}: {len(view)} bytes, its header announces {wanted}")
    if crc != _checksum(view):
        raise PayloadError(
            f"payload checksum is {_checksum(view):08x}, its header says {crc:08x}: damaged on the way"
        )
    stop = HEADER_BYTES + body_bytes
    body, integers = view[HEADER_BYTES:stop], np.frombuffer(view, "<i8", ints, stop).astype(np.int64)
    values, bits = np.zeros(0, np.float32), b""
    if kind is Kind.MASK:
        bits = unpack_mask(body, coding, count)
    else:
        values = unpack_floats(body, coding, dtype, count, exact)
    return Payload(kind, dtype, round_, client, examples, model, mask, count, exact, values, integers, bits)


def _check_start(view: memoryview) -> None:
    """Magic and version come before the length: headers of other versions have other lengths."""
    if len(view) >= _START.size:
        magic, version = _START.unpack_from(view)
        if magic != MAGIC:
            raise PayloadError(f"payload starts with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise PayloadError(f"payload has format version {version}, this program reads version {VERSION}")
    if len(view) < HEADER_BYTES:
        raise PayloadError(f"payload of {len(view)} bytes is shorter than its {HEADER_BYTES}-byte header")


def _read_codes(kind_code: int, dtype_code: int, coding_code: int) -> tuple[Kind, DType, Coding]:
    if kind_code not in set(Kind):
        raise PayloadError(f"payload kind {kind_code} is unknown, expected one of {[int(k) for k in Kind]}")
    kind = Kind(kind_code)
    if dtype_code not in _DTYPES_OF[kind]:
        raise PayloadError(
            f"payload dtype {dtype_code} does not fit a {kind.name} message, expected one of "
            f"{sorted(map(int, _DTYPES_OF[kind]))}"
        )
    codings = list(Coding) if kind is Kind.MASK else [Coding.PLAIN, Coding.DEFLATE]
    if coding_code not in codings:
        raise PayloadError(
            f"payload coding {coding_code} does not fit a {kind.name} message, expected one of "
            f"{[int(c) for c in codings]}"
        )
    return kind, DType(dtype_code), Coding(coding_code)


def _checksum(buffer: bytes | bytearray | memoryview) -> int:
    view = memoryview(buffer)
    return zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[:_CRC_AT]))


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise PayloadError(f"payload {what} is {got!r}, expected {expected!r}")


def _who(client: int) -> str:
    return "server" if client == SERVER else str(client)
