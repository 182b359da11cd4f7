# SPDX-License-Identifier: Apache-2.0
"""Answers under attack: a round ends as if the attackers had been absent, unless what they sent is a right answer.

A scene is a run that stands before a round, and what its clients answer in it. The round is then played again and again
from there, with some of the answers replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from fedpai.data import Dataset
from fedpai.federation.client import ClientError
from fedpai.federation.config import RunConfig
from fedpai.federation.engine import Federation, Reply
from fedpai.federation.payload import Kind, Payload, PayloadError, decode
from fedpai.federation.progress import Progress
from fedpai.federation.runner import Run
from fedpai.federation.server import Server
from tests.fedpai.federation.messages import patched
from tests.fedpai.federation.test_payload_fuzz import attacked

Answers = dict[int, list[bytes]]
Attack = dict[int, list[bytes] | None]

CLIENTS = 3
SCENES: dict[str, tuple[int, dict[str, Any]]] = {  # the round that is attacked, and the settings
    "thresholds": (2, {"method": "spafl", "threshold_penalty": 0.5, "compress": "deflate"}),
    "first_pruning": (2, {"method": "fedsparsify-local", "wire": "bf16", "compress": "deflate"}),
    "second_pruning": (3, {"method": "fedsparsify-local", "merge_rule": "voters", "server_opt": "yogi"}),
    "adjusted": (2, {"method": "feddst", "adjust_every": 1, "rounds": 4, "wire": "fp16"}),
    "adjusted_again": (3, {"method": "feddst", "adjust_every": 1, "rounds": 4, "server_opt": "avgm"}),
    "coarse_scores": (0, {"method": "fedpai-u", "criterion": "snip", "scores": "coarse"}),
}
PAIRS = ["first_pruning", "second_pruning", "adjusted", "adjusted_again"]


class Recorded:
    """A link to clients that answer what they are given here; None: no answer comes."""

    def __init__(self, answers: Attack) -> None:
        self.answers = answers

    def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        answer = self.answers[client]
        if answer is None:
            raise ClientError("gone")
        return Reply(answer)


@dataclass
class Outcome:
    """A round's row, and the server after it as bytes."""

    row: dict[str, Any]
    state: dict[str, Any]


@dataclass
class Scene:
    """A run before a round.

    Attributes:
        server: as it is then; copied before it is used.
        number: the round.
        answers, earlier: what the clients answer in it, and what they answered in the round before.
        absent: outcomes without some of the clients, by who they are.
    """

    run: Run
    server: Server
    number: int
    answers: Answers
    earlier: Answers
    absent: dict[frozenset[int], Outcome] = field(default_factory=dict)

    def play(self, attack: Attack) -> Outcome:
        """The round with these answers in place of the honest ones."""
        run, server = self.run, copied(self.server)
        link = Recorded({**self.answers, **attack})
        method = run.arms[0].federation.method
        federation = Federation(run.config, method, server, link, run.pool, run.evaluator, Progress())
        row = federation.choose_masks() if self.number == 0 else federation.run_round()
        return Outcome(row, as_bytes(server))

    def without(self, clients: frozenset[int]) -> Outcome:
        """The round in which these do not answer."""
        if clients not in self.absent:
            self.absent[clients] = self.play(dict.fromkeys(clients))
        return self.absent[clients]


def copied(server: Server) -> Server:
    """Nothing that the original holds is reached through the copy."""
    return replace(
        server,
        floats=server.floats.copy(),
        ints=server.ints.copy(),
        client_masks=dict(server.client_masks),
        informed=set(server.informed),
        extra={key: array.copy() for key, array in server.extra.items()},
        _places={},
        _sent=None,
    )


def as_bytes(server: Server) -> dict[str, Any]:
    """All that a checkpoint would save of it."""
    return {
        "floats": server.floats.tobytes(),
        "ints": server.ints.tobytes(),
        "mask": server.mask,
        "client masks": server.client_masks,
        "informed": server.informed,
        "extra": {key: array.tobytes() for key, array in server.extra.items()},
    }


@pytest.fixture(scope="module")
def scene(images: Dataset) -> Callable[[str], Scene]:
    """Scenes by name, each set once."""
    known: dict[str, Scene] = {}

    def get(name: str) -> Scene:
        if name not in known:
            known[name] = recorded(images, *SCENES[name])
        return known[name]

    return get


def recorded(images: Dataset, number: int, changes: dict[str, Any]) -> Scene:
    """Runs the honest rounds up to and with the one that is attacked."""
    common: dict[str, Any] = {
        "model": "mlp", "width": 0.02, "data": "synthetic", "sparsity": 0.6, "clients": CLIENTS, "sample": CLIENTS,
        "rounds": 3, "max_images": 40, "eval_images": 20, "batch": 20, "threads": 1,
    }  # fmt: skip
    run = Run(RunConfig(**{**common, **changes}), data=images)
    arm = run.arms[0]
    turn = arm.clients.turn
    heard: dict[int, Answers] = {at: {} for at in range(-1, number + 1)}

    def listen(client: int, round: int, messages: list[bytes]) -> Reply:
        reply = turn(client, round, messages)
        heard[round][client] = list(reply.messages)
        return reply

    arm.clients.turn = listen  # type: ignore[method-assign]
    for at in range(number):
        run._round(arm, at)
    before = copied(arm.federation.server)
    run._round(arm, number)
    arm.clients.turn = turn  # type: ignore[method-assign]
    scene = Scene(run, before, number, heard[number], heard[number - 1])
    honest = scene.play({})
    assert honest.row["refused"] == []
    assert honest.state == as_bytes(arm.federation.server)  # what is played is what happened
    assert len({frozenset(answer) for answer in scene.answers.values()}) == CLIENTS
    return scene


def readdressed(message: bytes, client: int) -> bytes:
    """The message as if another client had sent it."""
    return patched(message, 16, client.to_bytes(4, "little"))


def foreign(scene: Scene, client: int) -> list[bytes]:
    """Messages that are right elsewhere: of other clients, of the round before, of the server; and under its name.

    A whole answer of another client under its own name would be a right one, so single messages have no such copies.
    """
    others = [message for other, answer in scene.answers.items() if other != client for message in answer]
    found = [*others, *(message for answer in scene.earlier.values() for message in answer)]
    server = copied(scene.server)
    server.round = scene.number
    found += scene.run.arms[0].federation.method.send(server, client)
    if len(scene.answers[client]) == 2:
        (mask, _), (_, values) = (scene.answers[other] for other in sorted(set(scene.answers) - {client}))
        found += [readdressed(mask, client), readdressed(values, client)]
    return found


def wrong_list(data: st.DataObject, scene: Scene, client: int) -> list[bytes]:
    """The client's messages dropped, doubled, swapped, or with some from elsewhere; never as they should be."""
    messages, elsewhere = list(scene.answers[client]), foreign(scene, client)
    steps = st.lists(st.sampled_from(["drop", "double", "swap", "replace", "add"]), min_size=1, max_size=3)
    for how in data.draw(steps):
        at = data.draw(st.integers(0, max(0, len(messages) - 1)))
        if how == "add" or not messages:
            messages.insert(at, elsewhere[data.draw(st.integers(0, len(elsewhere) - 1))])
        elif how == "drop":
            del messages[at]
        elif how == "double":
            messages.insert(at, messages[at])
        elif how == "swap":
            messages.reverse()
        else:
            messages[at] = elsewhere[data.draw(st.integers(0, len(elsewhere) - 1))]
    assume(messages != scene.answers[client])
    return messages


def wrong_bytes(data: st.DataObject, scene: Scene, client: int) -> list[bytes]:
    """The client's messages with one of them mutated."""
    messages = list(scene.answers[client])
    at = data.draw(st.integers(0, len(messages) - 1))
    messages[at] = data.draw(attacked(st.just(messages[at])))
    return messages


def attackers(data: st.DataObject) -> list[int]:
    """One or two of the three clients."""
    return data.draw(st.lists(st.integers(0, CLIENTS - 1), min_size=1, max_size=CLIENTS - 1, unique=True))


def assert_as_absent(scene: Scene, attack: Attack, outcome: Outcome, refused: frozenset[int]) -> None:
    """The refused answers have a reason in the row and their bytes are counted; nothing else shows them."""
    assert [refusal["client"] for refusal in outcome.row["refused"]] == sorted(refused)
    assert all(refusal["reason"] for refusal in outcome.row["refused"])
    expected = scene.without(refused)
    assert outcome.state == expected.state
    counted = {"time", "refused", "clients", "bytes_up"}
    mine, theirs = ({k: v for k, v in one.row.items() if k not in counted} for one in (outcome, expected))
    assert mine == theirs
    sent = {client: sum(map(len, answer or [])) for client, answer in {**scene.answers, **attack}.items()}
    assert {client["client"]: client["bytes_up"] for client in outcome.row["clients"]} == sent


@pytest.mark.parametrize("name", SCENES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_messages_that_do_not_belong_here_are_refused(
    scene: Callable[[str], Scene], name: str, data: st.DataObject
) -> None:
    here = scene(name)
    attack: Attack = {client: wrong_list(data, here, client) for client in attackers(data)}
    assert_as_absent(here, attack, here.play(attack), frozenset(attack))


@pytest.mark.parametrize("name", SCENES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_mutated_messages_are_refused_or_right(scene: Callable[[str], Scene], name: str, data: st.DataObject) -> None:
    """Right is what differs from the honest answer in its numbers alone."""
    here = scene(name)
    attack: Attack = {client: wrong_bytes(data, here, client) for client in attackers(data)}
    outcome = here.play(attack)
    refused = frozenset(refusal["client"] for refusal in outcome.row["refused"])
    accepted = {client: attack[client] for client in attack if client not in refused}
    event(f"{len(accepted)} of {len(attack)} accepted")
    for client, messages in accepted.items():
        for message, honest in zip(messages, here.answers[client], strict=True):
            assert identity(decode(message)) == identity(decode(honest))
    if not accepted:
        assert_as_absent(here, attack, outcome, refused)
    else:  # the refused ones make no difference to what the accepted ones do
        silent: Attack = {**attack, **dict.fromkeys(refused)}
        assert outcome.state == here.play(silent).state
    examples = (decode(({**here.answers, **accepted}[client])[-1]).examples for client in range(CLIENTS))
    counted = [n for client, n in enumerate(examples) if client not in refused]
    assert outcome.row["examples"] == sum(counted)


def identity(payload: Payload) -> tuple[Any, ...]:
    """Everything in a message but values, integers and examples."""
    about = (payload.kind, payload.dtype, payload.round, payload.client, payload.count, payload.exact)
    return (*about, payload.ints.size, payload.model_digest, payload.mask_digest, payload.bits)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("part", [0, 1])
def test_half_an_answer_of_another_client_is_refused(scene: Callable[[str], Scene], name: str, part: int) -> None:
    """Each message is right by itself, round, sender and size; only together they are not."""
    here = scene(name)
    messages = list(here.answers[1])
    messages[part] = readdressed(here.answers[2][part], 1)
    outcome = here.play({1: messages})
    assert_as_absent(here, {1: messages}, outcome, frozenset({1}))
    assert "mask digest" in outcome.row["refused"][0]["reason"]
    whole = [readdressed(message, 1) for message in here.answers[2]]
    assert here.play({1: whole}).row["refused"] == []


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_client_takes_the_servers_thresholds_or_stays_as_it_is(
    scene: Callable[[str], Scene], data: st.DataObject
) -> None:
    """SpaFL's whole turn: what is refused, before or in training, leaves its memory bit for bit as it was."""
    here = scene("thresholds")
    arm = here.run.arms[0]
    server = copied(here.server)
    server.round = here.number
    (honest,) = arm.federation.method.send(server, 0)
    server.round -= 1
    (stale,) = arm.federation.method.send(server, 0)
    wrong = [[], [honest, honest], [stale], [honest, stale], here.answers[0], [honest, here.answers[0][0]]]
    which = data.draw(st.integers(-len(wrong), len(wrong) - 1))
    messages = wrong[which] if which >= 0 else [data.draw(attacked(st.just(honest)))]
    kept = arm.clients.memories[0]
    before = {key: array.tobytes() for key, array in kept.extra.items()}
    memory = arm.clients.memories[0] = copy.deepcopy(kept)
    try:
        reply = arm.clients.turn(0, here.number, messages)
    except (PayloadError, ClientError):
        assert {key: array.tobytes() for key, array in memory.extra.items()} == before
    else:
        (message,) = messages
        assert identity(decode(message)) == identity(decode(honest))
        np.testing.assert_array_equal(memory.extra["received"], decode(message).values)
        assert decode(reply.messages[0]).kind is Kind.THRESHOLDS
    finally:
        assert memory.mask is None
        arm.clients.memories[0] = kept
