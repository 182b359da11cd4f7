# SPDX-License-Identifier: Apache-2.0
"""Clients that fail or send what they must not: refused with a reason, and the model is as if they had been absent."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpai.data import Dataset
from fedpai.federation.client import Client, ClientError, ClientMemory
from fedpai.federation.config import RunConfig
from fedpai.federation.engine import Federation, Reply
from fedpai.federation.feedback import RESIDUAL
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import Coding, DType, Kind, PayloadError, decode, encode
from fedpai.federation.runner import Run
from fedpai.methods.base import Method
from tests.fedpai.federation.messages import deflated, patched

Make = Callable[..., RunConfig]
Change = Callable[[bytes], bytes | list[bytes]]

SMALL = {"model": "mlp", "width": 0.05, "rounds": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bf16": {"method": "magnitude", "wire": "bf16", "compress": "deflate"},
    "personal": {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal", "wire": "fp16"},
}


class Tamper:
    """A link that changes what some clients answer in one round; None: the answer never arrives."""

    def __init__(self, run: Run, changes: dict[int, Change | None], round: int = 2) -> None:
        self.inner, self.changes, self.round = run.arms[0].clients, changes, round

    def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        reply = self.inner.turn(client, round, messages)
        if client in self.changes and round == self.round:
            change = self.changes[client]
            if change is None:
                raise ClientError("gone")
            changed = change(reply.messages[0])
            reply.messages = changed if isinstance(changed, list) else [changed]
        return reply


def tampered(
    config: RunConfig, images: Dataset, changes: dict[int, Change | None], round: int = 2
) -> tuple[Federation, list[dict[str, Any]]]:
    """A run of `round` rounds and its rows."""
    run = Run(config, data=images)
    federation = run.arms[0].federation
    federation._link = Tamper(run, changes, round)
    return federation, [federation.choose_masks(), *(federation.run_round() for _ in range(config.rounds))]


def reencoded(message: bytes, **changes: Any) -> bytes:
    """The message as its client would have sent it with other fields: a right checksum over wrong content."""
    payload = decode(message)
    fields: dict[str, Any] = {
        "round": payload.round,
        "client": payload.client,
        "examples": payload.examples,
        "model_digest": payload.model_digest,
        "mask_digest": payload.mask_digest,
        "values": payload.values,
        "ints": payload.ints,
        "dtype": payload.dtype,
        "exact": payload.exact,
    }
    return encode(payload.kind, **{**fields, **changes})


def with_nan(message: bytes) -> bytes:
    """In the last value, which is never rounded."""
    values = decode(message).values.copy()
    values[-1] = np.nan
    return reencoded(message, values=values)


def inflating(message: bytes, size: int) -> bytes:
    """The header of the message over a deflated body of so many zeros."""
    body = deflated(bytes(size))
    head = bytearray(message[:120])
    head[8] = Coding.DEFLATE
    head[104:112] = struct.pack("<Q", len(body))
    return patched(bytes(head) + body)


BAD_ANSWERS: dict[str, tuple[Change, str]] = {
    "nan": (with_nan, "not finite"),
    "infinite": (
        lambda m: reencoded(m, values=np.where(decode(m).values == decode(m).values.max(), np.inf, 0)),
        "not finite",
    ),
    "stale_round": (lambda m: reencoded(m, round=1), "round is 1, expected 2"),
    "another_client": (lambda m: reencoded(m, client=9), "client is '9'"),
    "another_model": (lambda m: reencoded(m, model_digest=bytes(32)), "model digest"),
    "another_mask": (lambda m: reencoded(m, mask_digest=b"\1" * 32), "mask digest"),
    "another_kind": (
        lambda m: encode(
            Kind.SCORES,
            round=2,
            client=1,
            examples=9,
            model_digest=decode(m).model_digest,
            mask_digest=decode(m).mask_digest,
            values=decode(m).values,
        ),
        "kind is 'SCORES', expected 'VALUES'",
    ),
    "another_dtype": (lambda m: reencoded(m, dtype=DType.BFLOAT16), "dtype is 'BFLOAT16', expected 'FLOAT32'"),
    "no_examples": (lambda m: reencoded(m, examples=0), "claims 0 examples"),
    "negative_examples": (lambda m: reencoded(m, examples=-5), "claims -5 examples"),
    "more_examples_than_there_are": (lambda m: reencoded(m, examples=2**62), "expected < 536870912"),
    "too_few_values": (lambda m: reencoded(m, values=decode(m).values[1:]), "number of values"),
    "too_many_values": (
        lambda m: reencoded(m, values=np.zeros(decode(m).count + 1, np.float32)),
        "the receiver takes at most",
    ),
    "integers_it_has_not": (lambda m: reencoded(m, ints=np.ones(2, np.int64)), "number of integers is 2"),
    "truncated": (lambda m: m[:-4], "truncated"),
    "oversized": (lambda m: m + m, "oversized"),
    "bomb": (lambda m: inflating(m, 1 << 24), "inflates to more than the"),
    "deflated_too_short": (lambda m: inflating(m, 4 * decode(m).count - 4), "inflates to"),
    "flipped_bit": (lambda m: m[:200] + bytes([m[200] ^ 4]) + m[201:], "checksum"),
    "empty": (lambda m: b"", "shorter than"),
    "other_version": (lambda m: m[:4] + struct.pack("<H", 4) + m[6:], "version 4"),
    "old_version": (lambda m: m[:4] + struct.pack("<H", 1) + m[6:], "version 1, this program reads version 3"),
    "two_messages": (lambda m: [m, m], "expected one message, got 2"),
    "no_message": (lambda m: [], "expected one message, got 0"),
}


@pytest.fixture(scope="module")
def without_client_1() -> dict[str, Any]:
    """What a run without its second answer gives, filled by the first case that needs it."""
    return {}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_is_refused_and_the_round_goes_on(
    images: Dataset, tiny: Make, without_client_1: dict[str, Any], case: str
) -> None:
    change, reason = BAD_ANSWERS[case]
    config = tiny(**SMALL, clients=3, sample=3)
    if not without_client_1:
        federation, rows = tampered(config, images, {1: None})
        without_client_1.update(floats=federation.server.floats.tobytes(), row=rows[2])
    federation, rows = tampered(config, images, {1: change})
    row, other = rows[2], without_client_1["row"]
    assert [refusal["client"] for refusal in row["refused"]] == [1]
    assert reason in row["refused"][0]["reason"]
    assert other["refused"] == [{"client": 1, "reason": "gone"}]
    assert federation.server.floats.tobytes() == without_client_1["floats"]
    assert row["accuracy"] == other["accuracy"]
    assert row["examples"] == 2 * config.max_images


@pytest.mark.parametrize("name", SETTINGS)
def test_many_bad_answers_at_once(images: Dataset, tiny: Make, name: str) -> None:
    """Five of seven clients fail, each in its own way; the rounds go on, then and later, as if they had been silent."""
    config = tiny(**{**SMALL, "rounds": 3}, **SETTINGS[name], clients=7, sample=7)
    changes: dict[int, Change | None] = {
        0: with_nan,
        2: lambda m: reencoded(m, round=1),
        3: lambda m: reencoded(m, examples=-1),
        4: lambda m: m[: len(m) // 2],
        6: lambda m: reencoded(m, mask_digest=b"\2" * 32),
    }
    federation, rows = tampered(config, images, changes)
    silent, others = tampered(config, images, dict.fromkeys(changes))
    for mine, theirs in zip(rows, others, strict=True):
        assert [refusal["client"] for refusal in mine["refused"]] == [r["client"] for r in theirs["refused"]]
        assert (mine["accuracy"], mine["examples"]) == (theirs["accuracy"], theirs["examples"])
    assert len({refusal["reason"] for refusal in rows[2]["refused"]}) == 5
    assert rows[3]["refused"] == []
    assert federation.server.floats.tobytes() == silent.server.floats.tobytes()
    assert {key: array.tobytes() for key, array in federation.server.extra.items()} == {
        key: array.tobytes() for key, array in silent.server.extra.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_round_without_any_good_answer_changes_nothing(images: Dataset, tiny: Make, name: str) -> None:
    config = tiny(**SMALL, **SETTINGS[name], clients=2, sample=2)
    run = Run(config, data=images)
    federation = run.arms[0].federation
    federation._link = Tamper(run, {0: with_nan, 1: lambda m: m[:-1]})
    federation.choose_masks()
    first = federation.run_round()
    server = federation.server
    before = [array.copy() for array in (server.floats, server.ints, *server.extra.values())]
    second = federation.run_round()
    assert len(second["refused"]) == 2
    for array, old in zip((server.floats, server.ints, *server.extra.values()), before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert second["accuracy"] == first["accuracy"]


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), ValueError("bad image"), FloatingPointError("x")])
def test_a_client_whose_work_fails_is_refused(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def train(method: Method, client: Client) -> None:
        if client.id == 1 and client.round == 2:
            raise error
        client.fit()

    monkeypatch.setattr(Method, "train", train)
    config = tiny(**SMALL, clients=3, sample=3)
    federation, rows = tampered(config, images, {})
    silent, others = tampered(config, images, {1: None})
    assert rows[2]["refused"] == [{"client": 1, "reason": f"{type(error).__name__}: {error}"}]
    assert others[2]["refused"] == rows[2]["refused"]
    monkeypatch.undo()
    absent, _ = tampered(config, images, {1: None})
    assert federation.server.floats.tobytes() == silent.server.floats.tobytes() == absent.server.floats.tobytes()


def test_a_client_that_fails_after_changing_its_mask_comes_back(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(method: Method, client: Client) -> None:
        if client.id == 1 and client.round == 2:
            client.remask(MaskSet.from_positions(client.layout, client.memory.mask.positions[1:]))
            raise RuntimeError("then it stops")

    monkeypatch.setattr(Method, "train", train)
    _, rows = tampered(tiny(**{**SMALL, "rounds": 3}, method="magnitude", sample=4), images, {})
    assert [len(row["refused"]) for row in rows] == [0, 0, 1, 0]


def test_a_mistake_in_the_program_is_not_a_failing_client(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(method: Method, client: Client) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(Method, "train", train)
    with pytest.raises(TypeError, match="a bug"):
        tampered(tiny(**SMALL), images, {})


@pytest.mark.parametrize(
    ("mode", "change", "reason"),
    [
        ("shared", with_nan, "not finite"),
        ("shared", lambda m: reencoded(m, examples=0), "claims 0 examples"),
        ("shared", lambda m: reencoded(m, values=decode(m).values[1:]), "number of values"),
        ("personal", lambda m: m + b"\0", "oversized"),
        ("personal", lambda m: patched(m, 64, b"\1" * 32), "its header says 0101010101010101"),
        ("personal", lambda m: patched(m, 96, struct.pack("<Q", 8)), "payload"),
    ],
)
def test_a_bad_proposal_is_refused(images: Dataset, tiny: Make, mode: str, change: Change, reason: str) -> None:
    """Masks are then chosen from the others' proposals alone."""
    config = tiny(**{**SMALL, "rounds": 1}, method="fedpai-u", criterion="snip", mask_mode=mode, sample=4)
    federation, rows = tampered(config, images, {2: change}, round=0)
    silent, others = tampered(config, images, {2: None}, round=0)
    assert [refusal["client"] for refusal in rows[0]["refused"]] == [2]
    assert reason in rows[0]["refused"][0]["reason"]
    assert federation.server.mask == silent.server.mask
    assert rows[1]["sampled"] == others[1]["sampled"]
    assert federation.server.floats.tobytes() == silent.server.floats.tobytes()


def test_a_client_that_diverges_is_refused(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(lr=1e30, rounds=1), data=images)
    row = run.finish()[1]
    assert len(row["refused"]) == 3
    assert row["train_loss"] is None
    assert np.isfinite(run.arms[0].federation.server.floats).all()


def test_a_bad_download_is_refused_by_the_client(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(rounds=1, model="mlp", width=0.05), data=images)
    server = run.arms[0].federation.server
    good = server.values_message(0)
    with pytest.raises(ValueError, match="checksum"):
        run.arms[0].clients.turn(0, 0, [good[:-1] + b"\x55"])
    with pytest.raises(ValueError, match="round is 0, expected 1"):
        run.arms[0].clients.turn(0, 1, [good])
    with pytest.raises(ValueError, match="was sent no model"):
        run.arms[0].clients.turn(0, 1, [])


def test_a_header_of_local_training_is_not_unpacked(images: Dataset, tiny: Make) -> None:
    """What has no content may not announce any, however much it would inflate to."""

    def bomb(message: bytes) -> bytes:
        return patched(inflating(message, 1 << 20), 96, struct.pack("<Q", 1 << 18))

    _, rows = tampered(tiny(**SMALL, method="local", clients=3, sample=3), images, {1: bomb}, round=0)
    assert [refusal["client"] for refusal in rows[0]["refused"]] == [1]
    assert "the receiver takes at most 0" in rows[0]["refused"][0]["reason"]


BAD_DOWNLOADS: dict[str, tuple[Callable[[dict[str, bytes]], list[bytes]], str]] = {
    "mask_alone": (lambda m: [m["mask"]], "expected VALUES or MASK and VALUES, got MASK"),
    "values_without_their_mask": (lambda m: [m["values"]], "mask digest"),
    "a_mask_behind_values": (
        lambda m: [m["mask"], m["values"], m["other mask"]],
        "expected VALUES or MASK and VALUES, got MASK and VALUES and MASK",
    ),
    "swapped": (lambda m: [m["values"], m["mask"]], "got VALUES and MASK"),
    "mask_twice": (lambda m: [m["mask"], m["mask"]], "got MASK and MASK"),
    "values_twice": (lambda m: [m["mask"], m["values"], m["values"]], "got MASK and VALUES and VALUES"),
    "values_of_another_mask": (lambda m: [m["other mask"], m["values"]], "mask digest"),
    "damaged_behind_a_mask": (lambda m: [m["mask"], m["values"][:-1] + b"\x55"], "checksum"),
    "thresholds": (lambda m: [m["thresholds"]], "expected VALUES or MASK and VALUES, got THRESHOLDS"),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
def test_a_client_that_refuses_its_download_is_as_before(images: Dataset, tiny: Make, case: str) -> None:
    """A good mask has no effect either, where what comes with it is refused: values of the same size may not fit it."""
    change, reason = BAD_DOWNLOADS[case]
    run = Run(tiny(**SMALL, method="magnitude", sample=4, wire="bf16"), data=images)
    federation = run.arms[0].federation
    federation.choose_masks()
    federation.run_round()
    other = Run(tiny(**SMALL, method="random"), data=images).arms[0].federation
    other.choose_masks()
    server, other.server.round = federation.server, 1
    server.informed = set()
    sent = {
        "mask": server.mask_message(0)[0],
        "values": server.values_message(0),
        "other mask": other.server.mask_message(0)[0],
        "thresholds": server.thresholds_message(np.zeros(run.layout.channel_count, np.float32)),
    }
    clients = run.arms[0].clients
    clients.memories[0].mask = MaskSet.from_positions(run.layout, server.mask.positions[1:])
    clients.memories[0].extra = {RESIDUAL: np.arange(server.mask.kept - 1, dtype=np.float32)}
    before = snapshot(clients.memories[0])
    with pytest.raises(PayloadError, match=reason):
        clients.turn(0, 1, change(sent))
    assert snapshot(clients.memories[0]) == before
    clients.turn(0, 1, [sent["mask"], sent["values"]])
    assert clients.memories[0].mask == server.mask


def snapshot(memory: ClientMemory) -> tuple[MaskSet | None, dict[str, bytes]]:
    """What a client keeps between its turns."""
    return memory.mask, {key: array.tobytes() for key, array in memory.extra.items()}


def test_the_servers_work_on_messages_is_counted(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding and checking belong to the time of a round, with the merge."""
    run = Run(tiny(**SMALL, clients=3, sample=3), data=images)
    federation = run.arms[0].federation
    federation.choose_masks()
    for name in ("send", "accept"):
        plain = getattr(federation.method, name)

        def slow(*given: Any, plain: Callable[..., Any] = plain) -> Any:
            time.sleep(0.03)
            return plain(*given)

        monkeypatch.setattr(federation.method, name, slow)
    row = federation.run_round()
    assert row["time"]["merge"] >= 6 * 0.03
    assert sum(row["time"]["clients"]) > 0
