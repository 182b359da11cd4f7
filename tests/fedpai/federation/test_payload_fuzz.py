# SPDX-License-Identifier: Apache-2.0
"""The parser under attack: mutated messages decode to what their bytes say, or raise PayloadError, and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpai.data import Dataset
from fedpai.federation.client import Client, ClientMemory
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import (
    HEADER_BYTES,
    SERVER,
    Coding,
    DType,
    Kind,
    Payload,
    PayloadError,
    decode,
    encode,
)
from fedpai.federation.runner import Run
from tests.fedpai.federation.messages import MASK, MODEL, crafted, deflated, patched

MOST = 600
DTYPES = {
    Kind.VALUES: [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16],
    Kind.SCORES: [DType.FLOAT32, DType.INT16],
    Kind.THRESHOLDS: [DType.FLOAT32],
}
BOMB = deflated(bytes(1 << 22))
FIELDS = {  # name: offset and width in the header
    "version": (4, 2),
    "kind": (6, 1),
    "dtype": (7, 1),
    "coding": (8, 1),
    "zeros": (9, 3),
    "round": (12, 4),
    "client": (16, 4),
    "exact": (20, 4),
    "examples": (24, 8),
    "count": (96, 8),
    "body": (104, 8),
    "ints": (112, 4),
}


@st.composite
def honest(draw: st.DrawFn) -> bytes:
    """A message of any kind, dtype and coding."""
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(Kind))
    count = draw(st.integers(0, MOST))
    common = {"round": 2, "client": 3, "examples": 7, "model_digest": MODEL, "mask_digest": MASK}
    if kind is not Kind.MASK:
        dtype, exact = draw(st.sampled_from(DTYPES[kind])), draw(st.integers(0, count))
        values = noise.standard_normal(count).astype(np.float32)
        if dtype is DType.INT16:
            values[: count - exact] = noise.integers(-(2**15), 2**15, count - exact)
        return encode(
            kind,
            **common,
            values=values,
            ints=noise.integers(-9, 9, draw(st.integers(0, 3))) if kind is Kind.VALUES else None,
            dtype=dtype,
            exact=exact,
            deflate=draw(st.booleans()),
        )
    flags = noise.random(count) < draw(st.sampled_from([0.01, 0.1, 0.6]))
    if draw(st.booleans()):
        return encode(kind, **common, bits=np.packbits(flags).tobytes(), count=count)
    gaps = bytes(np.diff(np.flatnonzero(flags), prepend=-1).clip(0, 200).astype(np.uint8))
    return crafted(kind, DType.BITS, Coding.GAPS, count, deflated(gaps))


@st.composite
def attacked(draw: st.DrawFn, message: st.SearchStrategy[bytes]) -> bytes:
    """A message after some mutations, mostly under a checksum and lengths that fit again."""
    buffer = bytearray(draw(message))
    for how in draw(st.lists(st.sampled_from(["flip", "field", "cut", "extend", "swap", "bomb"]), max_size=3)):
        at = draw(st.integers(0, max(0, len(buffer) - 1)))
        if how == "flip" and buffer:
            buffer[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "field" and len(buffer) >= HEADER_BYTES:
            offset, width = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
            value = draw(st.one_of(st.integers(0, 9), st.integers(0, 256**width - 1)))
            buffer[offset : offset + width] = value.to_bytes(8, "little")[:width]
        elif how == "cut":
            del buffer[at:]
        elif how == "extend":
            buffer += draw(st.binary(min_size=1, max_size=40))
        elif how == "swap":
            buffer[at : at + 8] = draw(st.binary(min_size=8, max_size=8))
        elif how == "bomb":
            buffer[HEADER_BYTES:] = BOMB
    if len(buffer) >= HEADER_BYTES and draw(st.integers(0, 3)):
        ints = struct.unpack_from("<I", buffer, 112)[0]
        body = len(buffer) - HEADER_BYTES - 8 * ints
        if body >= 0 and draw(st.booleans()):
            buffer[104:112] = struct.pack("<Q", body)
        return patched(bytes(buffer))
    return bytes(buffer)


def slowly(buffer: bytes) -> tuple[list[float], list[int], bytes]:
    """Values, integers and bitmap of a message by the text of docs/wire.md, one element after the other."""
    kind, dtype, coding = buffer[6:9]
    exact, count, body_bytes = (int.from_bytes(buffer[a:b], "little") for a, b in ((20, 24), (96, 104), (104, 112)))
    body = buffer[HEADER_BYTES : HEADER_BYTES + body_bytes]
    tail = buffer[HEADER_BYTES + body_bytes :]
    ints = [int.from_bytes(tail[i : i + 8], "little", signed=True) for i in range(0, len(tail), 8)]
    raw = body if coding == Coding.PLAIN else zlib.decompress(body, -15)
    if kind == Kind.MASK:
        if coding != Coding.GAPS:
            return [], ints, raw
        flags, at = [0] * (8 * ((count + 7) // 8)), 0
        for byte in raw:
            at += byte
            if byte < 255:
                flags[at] = 1
                at += 1
        packed = [int("".join(map(str, flags[i : i + 8])), 2) for i in range(0, len(flags), 8)]
        return [], ints, bytes(packed)
    forms = {DType.FLOAT32: (4, "<f"), DType.BFLOAT16: (2, "<f"), DType.FLOAT16: (2, "<e"), DType.INT16: (2, "<h")}
    width, form = forms[DType(dtype)]
    values, start = [], 0
    for elements, size, code in ((count - exact, width, form), (exact, 4, "<f")):
        part = raw[start : start + elements * size]
        for i in range(elements):
            stored = part[i::elements] if coding == Coding.DEFLATE else part[i * size : (i + 1) * size]
            padded = bytes(2) + stored if size == 2 and dtype == DType.BFLOAT16 else stored
            values.append(struct.unpack(code, padded)[0])
        start += elements * size
    assert start == len(raw)
    return values, ints, raw[:0]


def check(payload: Payload, buffer: bytes) -> None:
    """Every field is what the bytes say."""
    values, ints, bits = slowly(buffer)
    assert payload.values.tolist() == values
    assert np.isfinite(payload.values).all()
    assert payload.ints.tolist() == ints
    assert payload.bits == bits
    assert payload.count <= MOST
    assert payload.kind is not Kind.MASK or len(bits) == (payload.count + 7) // 8
    read = struct.unpack_from("<BB4xIIIq32s32sQ", buffer, 6)
    mine = (payload.kind, payload.dtype, payload.round, payload.client, payload.exact, payload.examples)
    assert (*mine, payload.model_digest, payload.mask_digest, payload.count) == read


@settings(max_examples=300, deadline=None)
@given(honest())
def test_honest_messages_say_what_their_bytes_say(buffer: bytes) -> None:
    """The restatement that the attacks are judged by, and the format, in agreement."""
    try:
        payload = decode(buffer, most=MOST)
    except PayloadError as error:  # a made-up list of gaps may lead too far
        assert "keeps weight" in str(error)  # noqa: PT017
        return
    check(payload, buffer)


@settings(max_examples=600, deadline=None)
@given(attacked(honest()))
def test_attacked_messages_are_read_rightly_or_refused(buffer: bytes) -> None:
    tracemalloc.start()
    try:
        payload = decode(buffer, most=MOST)
    except PayloadError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 18
    check(payload, buffer)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(Kind), st.sampled_from(DType), st.sampled_from(Coding))
def test_random_content_behind_every_right_start(
    data: bytes, kind: Kind, dtype: DType, coding: Coding
) -> None:
    buffer = crafted(kind, dtype, coding, min(MOST, len(data)), data)
    try:
        payload = decode(buffer, most=MOST)
    except PayloadError:
        return
    check(payload, buffer)


@pytest.fixture(scope="module")
def run(images: Dataset) -> Run:
    """A server and clients of a small network, in the middle of a run with personal masks."""
    config = RunConfig(
        model="mlp", width=0.02, data="synthetic", criterion="snip", mask_mode="personal", sparsity=0.8,
        clients=2, sample=2, rounds=1, max_images=40, eval_images=20, threads=1, wire="bf16", compress="deflate",
    )  # fmt: skip
    run = Run(config, data=images)
    run.finish()
    return run


def client_of(run: Run, mask: MaskSet | None) -> Client:
    clients = run.arms[0].clients
    return Client(
        0, 1, run.config, run.layout, run.data, run.partition[0], ClientMemory(mask), clients._pool
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_receiver_takes_what_fits_or_changes_nothing(run: Run, data: st.DataObject) -> None:
    server = run.arms[0].federation.server
    mask = server.mask_of(0)
    sender = client_of(run, mask)
    sender.floats, sender.ints = server.floats[server.places_of(0)], server.ints
    good: dict[str, Callable[[], bytes]] = {
        "values": sender.values_message,
        "mask": lambda: sender.mask_message(mask),
        "scores": lambda: sender.scores_message(np.linspace(0, 1, run.layout.weight_count, dtype=np.float32)),
        "download": lambda: server.values_message(0),
    }
    what = data.draw(st.sampled_from(sorted(good)))
    buffer = data.draw(attacked(st.just(good[what]())))
    if what == "download":
        receiver = client_of(run, mask)
        try:
            receiver.receive([buffer])
        except PayloadError:
            assert receiver.floats is receiver.ints is None
            assert receiver.memory.mask is mask
        else:
            assert decode(buffer).client == SERVER
        return
    before = server.floats.tobytes(), server.ints.tobytes(), server.mask
    try:
        update = getattr(server, f"read_{what}")(0, buffer)
    except PayloadError:
        pass
    else:
        assert update.examples >= 1
        if what == "mask":
            assert update.mask.digest == decode(buffer).mask_digest
        else:
            array = update.floats if what == "values" else update.scores
            assert array.size == (run.layout.float_count(mask) if what == "values" else run.layout.weight_count)
            assert np.isfinite(array).all()
    assert before == (server.floats.tobytes(), server.ints.tobytes(), server.mask)
