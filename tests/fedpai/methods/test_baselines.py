# SPDX-License-Identifier: Apache-2.0
"""FedProx and local training against their formulas in plain dense torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.payload import HEADER_BYTES, PayloadError
from fedpai.federation.runner import Run
from fedpai.methods.base import MethodError
from tests.fedpai.methods.restatement import Restatement, assert_uneven

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("sample", [3, 4])
def test_fedprox_against_its_formulas(small: Dataset, telling: Make, sample: int) -> None:
    run = Run(telling(method="fedprox", prox_mu=250.0, sample=sample), data=small)
    assert_uneven(run)
    rows = run.finish()
    dense = Restatement(run)
    for number in (1, 2, 3):
        answers = {client: dense.trained(number, client, {}, mu=250.0) for client in rows[number]["sampled"]}
        dense.step(dense.mean(answers))
    dense.assert_server(run.arms[0].federation.server)


def test_fedprox_that_does_not_pull_is_fedavg(few: Dataset, tiny: Make) -> None:
    floats = []
    for name in ("fedprox", "fedavg"):
        run = Run(tiny(method=name, prox_mu=0.0), data=few)
        run.finish()
        floats.append(run.arms[0].federation.server.floats)
    assert np.array_equal(*floats)


def test_fedprox_stays_nearer_to_the_global_model(few: Dataset, tiny: Make) -> None:
    start = Run(tiny(), data=few).arms[0].federation.server.floats
    count = Run(tiny(), data=few).layout.weight_count
    gone = []
    for mu in (0.0, 1.0, 10.0):
        run = Run(tiny(method="fedprox", prox_mu=mu, rounds=1), data=few)
        run.finish()
        gone.append(float(np.linalg.norm((run.arms[0].federation.server.floats - start)[:count])))
    assert gone[0] > gone[1] > gone[2] > 0


@pytest.mark.parametrize("sample", [3, 4])
def test_local_against_its_formulas(small: Dataset, telling: Make, sample: int) -> None:
    """Each client goes on where it stopped, in the rounds in which it is asked."""
    run = Run(telling(method="local", sample=sample), data=small)
    assert_uneven(run)
    rows = run.finish()
    dense = Restatement(run)
    own = dict.fromkeys(range(4), dense.state)
    for number in (1, 2, 3):
        for client in rows[number]["sampled"]:
            own[client] = dense.trained(number, client, {}, own=own[client])
    memories = run.arms[0].clients.memories
    for client, state in own.items():
        extra = memories[client].extra
        dense.assert_equal(run.layout.scatter(extra["floats"], extra["ints"]), state)
    initial = run.layout.scatter(*run.arms[0].federation.server.dense())
    assert all(torch.equal(initial[key], tensor.to(initial[key].dtype)) for key, tensor in dense.state.items())


def test_local_sends_the_initial_model_and_then_nothing(few: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="local", rounds=2, alpha=0.3), data=few)
    rows = run.finish()
    assert rows[0]["bytes_up"] == 4 * HEADER_BYTES
    assert rows[0]["bytes_down"] == 4 * (HEADER_BYTES + 4 * run.layout.float_count(None) + 8 * run.layout.int_count)
    assert [(row["bytes_up"], row["bytes_down"], row["refused"]) for row in rows[1:]] == [(0, 0, [])] * 2
    sizes = [run.partition[client].size for client in rows[1]["sampled"]]
    assert rows[1]["examples"] == sum(sizes)
    assert all(0 <= row["personal_accuracy"] <= 1 for row in rows[1:])
    assert not run.arms[0].federation.method.has_global


def test_local_refuses_messages_and_strangers(few: Dataset, tiny: Make) -> None:
    """Client 1 is lost in round 0: it is refused whenever it is asked, and the others go on."""
    run = Run(tiny(method="local", rounds=2, sample=4), data=few)
    arm = run.arms[0]
    turn, server, method = arm.clients.turn, arm.federation.server, arm.federation.method

    def lossy(client: int, round: int, messages: list[bytes]) -> Any:
        reply = turn(client, round, messages)
        if client == 1 and round == 0:
            reply.messages = []
            arm.clients.memories[1].extra.clear()
        return reply

    arm.clients.turn = lossy
    rows = run.finish()
    assert [len(row["refused"]) for row in rows] == [1, 1, 1]
    assert rows[0]["refused"][0]["reason"] == "expected one message, got 0"
    assert rows[1]["refused"][0]["reason"] == "client 1 has no model: it was not there in round 0"
    with pytest.raises(PayloadError, match="client 1: was not there in round 0"):
        method.accept(server, 1, [])
    with pytest.raises(PayloadError, match="client 2: expected no message, got 1"):
        method.accept(server, 2, [b""])
    with pytest.raises(MethodError, match="no client took the initial model"):
        method.agree(server, [])


def test_local_training_that_diverges_is_refused(few: Dataset, tiny: Make) -> None:
    """No message says so here; what it leaves behind must not become the client's model."""
    run = Run(tiny(method="local", lr=1e30, rounds=2), data=few)
    rows = run.finish()
    for row in rows[1:]:
        assert [refused["reason"] for refused in row["refused"]] == [
            "its training diverged; it keeps the model of its last turn"
        ] * 3
        assert row["personal_accuracy"] is None
    initial, _ = run.pool.initial()
    for memory in run.arms[0].clients.memories.values():
        assert memory.extra["floats"].tobytes() == initial.tobytes()
