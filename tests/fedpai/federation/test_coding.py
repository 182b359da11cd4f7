# SPDX-License-Identifier: Apache-2.0
"""How contents become bytes: exact where they must be, near the entropy, and bounded when they lie."""

from __future__ import annotations

import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai.federation import coding
from fedpai.federation.payload import HEADER_BYTES, Coding, DType, Kind, Payload, PayloadError, decode, encode
from tests.fedpai.federation.messages import MASK, MODEL, crafted, deflated

HALVES = [DType.BFLOAT16, DType.FLOAT16]


def values_message(values: np.ndarray, dtype: DType, *, exact: int = 0, deflate: bool = False) -> bytes:
    return encode(
        Kind.VALUES,
        round=2,
        client=3,
        examples=7,
        model_digest=MODEL,
        mask_digest=MASK,
        values=values,
        ints=np.array([5], np.int64),
        dtype=dtype,
        exact=exact,
        deflate=deflate,
    )


def mask_message(flags: np.ndarray) -> bytes:
    return encode(
        Kind.MASK,
        round=2,
        client=3,
        examples=7,
        model_digest=MODEL,
        mask_digest=MASK,
        bits=np.packbits(flags).tobytes(),
        count=flags.size,
    )


def flags_of(payload: Payload) -> np.ndarray:
    return np.unpackbits(np.frombuffer(payload.bits, np.uint8))[: payload.count].astype(bool)


# -- floats --------------------------------------------------------------------------------------------------


def representable(dtype: DType) -> np.ndarray:
    """Every finite number of a 16-bit dtype that is not negative, in float64, by its bit pattern."""
    patterns = np.arange(1 << 15, dtype=np.uint16)
    if dtype is DType.FLOAT16:
        numbers = patterns.view(np.float16).astype(np.float32)
    else:
        numbers = (patterns.astype(np.uint32) << 16).view(np.float32)
    return numbers[np.isfinite(numbers)].astype(np.float64)


def nearest_even(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Rounding restated: the nearer of the two neighbours in the list of all numbers, of equals the even pattern."""
    numbers = representable(dtype)
    size = np.abs(values.astype(np.float64))
    above = np.searchsorted(numbers, size).clip(1, numbers.size - 1)
    below = above - 1
    down, up = size - numbers[below], numbers[above] - size
    chosen = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(numbers[chosen], values).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.name)
def test_halves_are_rounded_to_nearest_even(dtype: DType) -> None:
    draw = np.random.default_rng(0)
    numbers = representable(dtype)
    ties = (numbers[:-1] + numbers[1:]) / 2
    limit = numbers[-1]
    scaled = draw.standard_normal(20_000) * 10.0 ** draw.uniform(-9, 4, 20_000)
    values = np.concatenate((scaled, ties, -ties, [0.0, -0.0, limit, -limit])).astype(np.float32)
    values = values[np.abs(values) <= limit]
    expected = nearest_even(values, dtype)
    assert coding.rounded(values, dtype).tobytes() == expected.tobytes()
    assert decode(values_message(values, dtype)).values.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(coding.rounded(expected, dtype), expected)


@pytest.mark.parametrize(
    ("dtype", "bad", "largest"),
    [
        (DType.FLOAT16, 65520.0, "65504"),
        (DType.FLOAT16, -1e30, "65504"),
        (DType.FLOAT16, np.nan, "65504"),
        (DType.BFLOAT16, 3.4e38, "3.38953e\\+38"),
        (DType.BFLOAT16, np.inf, "3.38953e\\+38"),
        (DType.BFLOAT16, np.nan, "3.38953e\\+38"),
    ],
)
def test_what_a_half_cannot_hold_is_not_sent(dtype: DType, bad: float, largest: str) -> None:
    values = np.array([1.0, 2.0, bad, 4.0], np.float32)
    text = rf"1 values cannot be sent as {dtype.name}, whose largest is {largest}: the first is .* at position 2"
    with pytest.raises(PayloadError, match=text):
        values_message(values, dtype)
    values_message(np.array([1.0, 2.0, 4.0, bad], np.float32), dtype, exact=1)  # refused by its receiver only


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, *HALVES], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("count", "exact"), [(0, 0), (1, 0), (1, 1), (9, 2), (5000, 37), (64, 64)])
def test_values_survive(dtype: DType, count: int, exact: int, deflate: bool) -> None:
    values = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    buffer = values_message(values, dtype, exact=exact, deflate=deflate)
    payload = decode(buffer, most=count)
    split = count - (0 if dtype is DType.FLOAT32 else exact)
    np.testing.assert_array_equal(payload.values[:split], coding.rounded(values[:split], dtype))
    np.testing.assert_array_equal(payload.values[split:], values[split:])
    assert payload.ints.tolist() == [5]
    assert payload.values.dtype == np.float32
    width = 4 if dtype is DType.FLOAT32 else 2
    plain = HEADER_BYTES + width * split + 4 * (count - split) + 8
    assert len(buffer) < plain if deflate and count == 5000 else len(buffer) == plain


def test_values_that_do_not_deflate_travel_plain() -> None:
    noise = np.random.default_rng(2).integers(0, 2**31 - 2**24, 1000, np.int32).view(np.float32)
    assert len(values_message(noise, DType.FLOAT32, deflate=True)) <= HEADER_BYTES + 4000 + 8
    few = np.array([1.5], np.float32)
    assert values_message(few, DType.FLOAT32, deflate=True) == values_message(few, DType.FLOAT32)


# -- masks ---------------------------------------------------------------------------------------------------


def slow_gaps(flags: np.ndarray) -> bytes:
    """The list of gaps, one weight after the other."""
    out, gap = [], 0
    for kept in flags:
        if kept:
            out.append(gap)
            gap = 0
        else:
            gap += 1
            if gap == 255:
                out.append(255)
                gap = 0
    while out and out[-1] == 255:
        out.pop()
    return bytes(out)


@pytest.mark.parametrize("lengths", [[0], [254], [255], [256], [509, 510, 511], [3, 1000, 0, 0, 255]])
def test_long_gaps(lengths: list[int]) -> None:
    flags = np.concatenate([np.append(np.zeros(n, bool), True) for n in lengths] + [np.zeros(600, bool)])
    assert coding._gaps(np.flatnonzero(flags)) == slow_gaps(flags)
    body = deflated(slow_gaps(flags))
    np.testing.assert_array_equal(
        flags_of(decode(crafted(Kind.MASK, DType.BITS, Coding.GAPS, flags.size, body))), flags
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_every_mask_survives_in_every_coding(count: int, density: float, seed: int) -> None:
    flags = np.random.default_rng(seed).random(count) < density
    bits = np.packbits(flags).tobytes()
    buffer = mask_message(flags)
    assert decode(buffer, most=count).bits == bits
    assert len(buffer) <= HEADER_BYTES + len(bits)
    for how, body in (
        (Coding.PLAIN, bits),
        (Coding.DEFLATE, deflated(bits)),
        (Coding.GAPS, deflated(slow_gaps(flags))),
    ):
        assert decode(crafted(Kind.MASK, DType.BITS, how, count, body), most=count).bits == bits


@pytest.mark.parametrize(
    ("density", "bound"), [(0.02, 1.02), (0.05, 1.02), (0.1, 1.02), (0.3, 1.02), (0.5, 1.0001), (0.9, 1.06)]
)
def test_random_masks_come_near_their_entropy(density: float, bound: float) -> None:
    count = 400_000
    flags = np.random.default_rng(3).random(count) < density
    entropy = -count * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
    size = len(mask_message(flags)) - HEADER_BYTES
    assert size < bound * entropy
    assert size <= count // 8


def test_blocks_cost_a_fraction_of_their_weights() -> None:
    """16 rows that keep the same columns: close to the entropy of one of them."""
    draw = np.random.default_rng(4)
    flags = np.repeat(draw.random((20, 1, 2000)) < 0.02, 16, axis=1).reshape(-1)
    same_number_at_random = draw.permutation(flags)
    assert len(mask_message(flags)) < 0.15 * len(mask_message(same_number_at_random))


# -- lies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count", "body", "text"),
    [
        (Coding.PLAIN, 16, b"\1", "body has 1 bytes, a bitmap of 16 bits takes 2"),
        (Coding.PLAIN, 16, b"\1\2\3", "body has 3 bytes, a bitmap of 16 bits takes 2"),
        (Coding.DEFLATE, 16, deflated(b"\1"), "inflates to 1 bytes, expected 2"),
        (Coding.DEFLATE, 16, deflated(b"\1\2\3"), "inflates to more than the 2 bytes"),
        (Coding.DEFLATE, 16, deflated(b"\1\2") + b"\0", "1 bytes after its end"),
        (Coding.DEFLATE, 16, deflated(b"\1\2")[:-1], "is cut off|cannot be inflated"),
        (Coding.DEFLATE, 16, zlib.compress(b"\1\2"), "cannot be inflated"),
        (Coding.DEFLATE, 16, b"", "is cut off: it inflates to 0 bytes"),
        (Coding.GAPS, 16, deflated(b"\1\x0e"), "keeps weight 16, the last one is 15"),
        (Coding.GAPS, 600, deflated(b"\xff\xff\x5a"), "keeps weight 600, the last one is 599"),
        (Coding.GAPS, 600, deflated(b"\1\xff"), "ends in dropped weights"),
        (Coding.GAPS, 3, deflated(b"\0\0\0\0"), "inflates to more than the 3 bytes"),
        (Coding.GAPS, 16, deflated(b"\1\1") + deflated(b"\1"), "bytes after its end"),
    ],
)
def test_bodies_that_are_no_mask(how: Coding, count: int, body: bytes, text: str) -> None:
    with pytest.raises(PayloadError, match=text):
        decode(crafted(Kind.MASK, DType.BITS, how, count, body))


@pytest.mark.parametrize(
    ("dtype", "count", "exact", "text"),
    [
        (DType.FLOAT32, 4, 0, "inflates to 12 bytes, expected 16"),
        (DType.FLOAT32, 2, 0, "inflates to more than the 8 bytes"),
        (DType.BFLOAT16, 5, 0, "inflates to more than the 10 bytes"),
        (DType.FLOAT16, 5, 2, "inflates to 12 bytes, expected 14"),
        (DType.FLOAT16, 5, 6, "announces 6 float32 values beside FLOAT16, among 5 in all"),
    ],
)
def test_bodies_of_another_number_of_values(dtype: DType, count: int, exact: int, text: str) -> None:
    body = deflated(np.ones(3, np.float32).tobytes())
    with pytest.raises(PayloadError, match=text):
        decode(crafted(Kind.VALUES, dtype, Coding.DEFLATE, count, body, exact=exact))


@pytest.mark.parametrize("dtype", [DType.FLOAT32, *HALVES], ids=lambda dtype: dtype.name)
def test_values_that_are_not_finite_are_refused_from_any_coding(dtype: DType) -> None:
    for exact in (0, 3) if dtype is not DType.FLOAT32 else (0,):
        width = 4 if dtype is DType.FLOAT32 else 2
        body = b"\xff" * (width * (3 - exact) + 4 * exact)
        for how, coded in ((Coding.PLAIN, body), (Coding.DEFLATE, deflated(body))):
            with pytest.raises(PayloadError, match="holds 3 values that are not finite"):
                decode(crafted(Kind.VALUES, dtype, how, 3, coded, exact=exact))


@pytest.mark.parametrize("honest_count", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "how"),
    [
        (Kind.VALUES, DType.FLOAT32, Coding.DEFLATE),
        (Kind.VALUES, DType.BFLOAT16, Coding.DEFLATE),
        (Kind.MASK, DType.BITS, Coding.DEFLATE),
        (Kind.MASK, DType.BITS, Coding.GAPS),
    ],
)
def test_a_bomb_takes_no_memory(kind: Kind, dtype: DType, how: Coding, honest_count: bool) -> None:
    """64 MiB of zeros in 64 KiB: refused by the count it admits to, or once it passes the count it claims."""
    body = deflated(bytes(1 << 26))
    buffer = crafted(kind, dtype, how, (1 << 26) if honest_count else 1000, body)
    assert len(buffer) < 1 << 17
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="the receiver takes at most 1000" if honest_count else "more than"):
            decode(buffer, most=1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
