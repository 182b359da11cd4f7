# SPDX-License-Identifier: Apache-2.0
"""Messages put together by hand, right or wrong, under a checksum that fits."""

from __future__ import annotations

import struct
import zlib

from fedpai.federation.payload import HEADER_BYTES, Coding, DType, Kind

MODEL, MASK = bytes(range(32)), bytes(range(32, 64))


def deflated(data: bytes) -> bytes:
    """The data as a raw deflate stream."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


def patched(buffer: bytes, at: int = 0, new: bytes = b"") -> bytes:
    """The buffer with some bytes replaced and a checksum that fits again: a sender's mistake, not damage."""
    changed = bytearray(buffer)
    changed[at : at + len(new)] = new
    crc = zlib.crc32(changed[HEADER_BYTES:], zlib.crc32(changed[: HEADER_BYTES - 4]))
    changed[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", crc)
    return bytes(changed)


def crafted(
    kind: Kind, dtype: DType, coding: Coding, count: int, body: bytes, *, exact: int = 0, ints: bytes = b""
) -> bytes:
    """A message of client 3 in round 2, for 7 examples, with any content."""
    head = b"FPAI" + struct.pack("<HBBB3xIIIq", 3, kind, dtype, coding, 2, 3, exact, 7)
    head += MODEL + MASK + struct.pack("<QQII", count, len(body), len(ints) // 8, 0)
    return patched(head + body + ints)
