# SPDX-License-Identifier: Apache-2.0
"""The message format: what goes in comes out, and nothing else is taken in."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai.federation import payload as wire
from fedpai.federation.payload import HEADER_BYTES, DType, Kind, Payload, PayloadError, decode, encode

MODEL, MASK = bytes(range(32)), bytes(range(32, 64))


def message(values: int = 5, *, examples: int = 7, client: int = 3, round: int = 2) -> bytes:
    return encode(
        Kind.VALUES,
        round=round,
        client=client,
        examples=examples,
        model_digest=MODEL,
        mask_digest=MASK,
        values=np.arange(values, dtype=np.float32),
        ints=np.array([11, -1], np.int64),
    )


def expect(payload: Payload, **changes: object) -> Payload:
    wanted: dict = {
        "kind": Kind.VALUES,
        "round": 2,
        "client": 3,
        "model_digest": MODEL,
        "mask_digest": MASK,
        "count": 5,
        "ints": 2,
    }
    return payload.expect(**{**wanted, **changes})


def patched(buffer: bytes, at: int, new: bytes) -> bytes:
    """The buffer with some bytes replaced and a checksum that fits again: a sender's mistake, not damage."""
    changed = bytearray(buffer)
    changed[at : at + len(new)] = new
    crc = zlib.crc32(changed[HEADER_BYTES:], zlib.crc32(changed[: HEADER_BYTES - 4]))
    changed[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", crc)
    return bytes(changed)


def test_round_trip() -> None:
    payload = expect(decode(message()))
    assert (payload.kind, payload.round, payload.client, payload.examples) == (Kind.VALUES, 2, 3, 7)
    np.testing.assert_array_equal(payload.values, np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(payload.ints, [11, -1])


def test_size_is_header_plus_content() -> None:
    assert len(message(1000)) == HEADER_BYTES + 4 * 1000 + 8 * 2


def test_mask_round_trip() -> None:
    bits = bytes([0b10100000, 0b01000000])
    buffer = encode(
        Kind.MASK, round=0, client=1, examples=4, model_digest=MODEL, mask_digest=MASK, bits=bits, count=10
    )
    assert len(buffer) == HEADER_BYTES + 2
    assert decode(buffer).bits == bits
    assert decode(buffer).count == 10


def test_header_is_laid_out_as_documented() -> None:
    """docs/wire.md, field by field, for a message whose parts all differ."""
    buffer = message(5)
    body, ints = np.arange(5, dtype="<f4").tobytes(), np.array([11, -1], "<i8").tobytes()
    head = b"FPAI" + bytes([3, 0, 1, 0, 0, 0, 0, 0])
    head += struct.pack("<IIIq", 2, 3, 0, 7) + MODEL + MASK + struct.pack("<QQI", 5, len(body), 2)
    crc = zlib.crc32(body + ints, zlib.crc32(head))
    assert buffer == head + struct.pack("<I", crc) + body + ints


def test_version_1_is_refused_by_name() -> None:
    """Its header was shorter than ours, so the version is looked at before the length."""
    old = b"FPAI" + struct.pack("<HBBIIq32s32sQII", 1, 1, 0, 2, 3, 7, MODEL, MASK, 0, 0, 0)
    assert len(old) == 104
    with pytest.raises(PayloadError, match="format version 1, this program reads version 3"):
        decode(old)


def test_decoded_values_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        decode(message()).values[0] = 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": Kind.SCORES}, "kind is 'VALUES', expected 'SCORES'"),
        ({"round": 3}, "round is 2, expected 3"),
        ({"client": 4}, "client is '3', expected '4'"),
        ({"client": wire.SERVER}, "client is '3', expected 'server'"),
        ({"model_digest": MASK}, "model digest"),
        ({"mask_digest": MODEL}, "mask digest"),
        ({"mask_digest": MASK[:-1] + b"\0"}, "mask digest"),
        ({"count": 6}, "number of values is 5, expected 6"),
        ({"ints": 1}, "number of integers is 2, expected 1"),
        ({"dtype": DType.BFLOAT16}, "dtype is 'FLOAT32', expected 'BFLOAT16'"),
    ],
)
def test_another_message_than_expected(change: dict, text: str) -> None:
    with pytest.raises(PayloadError, match=text):
        expect(decode(message()), **change)


@pytest.mark.parametrize("examples", [0, -1, -(2**40)])
def test_example_counts_below_one(examples: int) -> None:
    with pytest.raises(PayloadError, match=f"claims {examples} examples"):
        expect(decode(message(examples=examples)))


def test_server_messages_need_no_examples() -> None:
    expect(decode(message(examples=0, client=wire.SERVER)), client=wire.SERVER)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_shorter_than_the_header(length: int) -> None:
    with pytest.raises(PayloadError, match=f"payload of {length} bytes is shorter"):
        decode(message()[:length])


def test_truncated_and_oversized() -> None:
    with pytest.raises(PayloadError, match="truncated"):
        decode(message()[:-1])
    with pytest.raises(PayloadError, match="oversized"):
        decode(message() + b"\0")


def test_damaged_content() -> None:
    buffer = bytearray(message())
    buffer[HEADER_BYTES + 3] ^= 1
    with pytest.raises(PayloadError, match="checksum"):
        decode(buffer)


@pytest.mark.parametrize(
    ("at", "new", "text"),
    [
        (0, b"XXXX", "starts with b'XXXX'"),
        (4, struct.pack("<H", 9), "format version 9"),
        (4, struct.pack("<H", 1), "format version 1, this program reads version 3"),
        (6, b"\x63", "kind 99 is unknown"),
        (7, b"\x01", "dtype 1 does not fit a VALUES message"),
        (7, b"\x09", "dtype 9 does not fit a VALUES message"),
        (8, b"\x02", r"coding 2 does not fit a VALUES message, expected one of \[0, 1\]"),
        (8, b"\x01", "body cannot be inflated"),
        (9, b"\x01", "010000 where its header must be 0"),
        (20, struct.pack("<I", 1), "announces 1 float32 values beside FLOAT32"),
        (96, struct.pack("<Q", 2**63), "announces 9223372036854775808 elements, the receiver takes at most"),
        (96, struct.pack("<Q", 4), "body has 20 bytes, its 4 values take 16"),
        (96, struct.pack("<Q", 6), "body has 20 bytes, its 6 values take 24"),
        (104, struct.pack("<Q", 2**63), "truncated"),
        (104, struct.pack("<Q", 16), "oversized"),
        (112, struct.pack("<I", 2**32 - 1), "truncated"),
        (112, struct.pack("<I", 1), "oversized"),
        (HEADER_BYTES + 8, struct.pack("<f", float("nan")), "1 values that are not finite.*position 2"),
        (HEADER_BYTES, struct.pack("<f", float("-inf")), "not finite, the first is -inf at position 0"),
    ],
)
def test_wrong_fields_under_a_right_checksum(at: int, new: bytes, text: str) -> None:
    with pytest.raises(PayloadError, match=text):
        decode(patched(message(), at, new))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_content_behind_a_right_start(data: bytes, fix: bool) -> None:
    """Random headers, also with a checksum that fits, never raise anything but PayloadError."""
    buffer = wire.MAGIC + struct.pack("<HBB4s", wire.VERSION, 1, 0, b"") + data
    if fix and len(buffer) >= HEADER_BYTES:
        buffer = patched(buffer, 0, b"")
    try:
        payload = decode(buffer)
    except PayloadError:
        return
    assert len(buffer) == HEADER_BYTES + 4 * payload.count + 8 * payload.ints.size
    assert np.isfinite(payload.values).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.data())
def test_every_truncation_is_refused(values: int, data: st.DataObject) -> None:
    buffer = message(values)
    with pytest.raises(PayloadError):
        decode(buffer[: data.draw(st.integers(0, len(buffer) - 1))])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 20), st.data())
def test_every_single_flipped_bit_is_refused(values: int, data: st.DataObject) -> None:
    buffer = bytearray(message(values))
    bit = data.draw(st.integers(0, 8 * len(buffer) - 1))
    buffer[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(PayloadError):
        decode(buffer)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.integers(1, 2**63 - 1),
    st.integers(0, 2**32 - 1),
)
def test_any_finite_values_survive(values: list, ints: list, examples: int, round: int) -> None:
    payload = decode(
        encode(
            Kind.VALUES,
            round=round,
            client=0,
            examples=examples,
            model_digest=MODEL,
            mask_digest=MASK,
            values=np.array(values, np.float32),
            ints=np.array(ints, np.int64),
        )
    )
    assert payload.values.tobytes() == np.array(values, np.float32).tobytes()
    assert payload.ints.tolist() == ints
    assert (payload.examples, payload.round) == (examples, round)
