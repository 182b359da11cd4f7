# SPDX-License-Identifier: Apache-2.0
"""The loop: equal to a slow restatement, exact in its bytes, unmoved by bad messages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpai.data import Dataset
from fedpai.federation.client import ClientError
from fedpai.federation.config import RunConfig
from fedpai.federation.engine import Federation, Reply
from fedpai.federation.payload import HEADER_BYTES, Kind, decode, encode
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import generator

Make = Callable[..., RunConfig]


def restate_fedavg(config: RunConfig, run: Run, participants: list[list[int]]) -> dict[str, torch.Tensor]:
    """Dense FedAvg as one would write it in a page of plain torch."""
    model = create_model(config, run.data)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for number, clients in enumerate(participants, start=1):
        results = []
        for client in clients:
            model.load_state_dict(state)
            model.train()
            optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=5e-4)
            for epoch in range(config.local_epochs):
                order = generator(config.seed, "batches", number, client, epoch)
                for batch in np.array_split(
                    order.permutation(run.partition[client]),
                    range(config.batch, run.partition[client].size, config.batch),
                ):
                    x, y = run.data.batch(batch)
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimiser.step()
            n = run.partition[client].size
            results.append((n, {key: tensor.clone() for key, tensor in model.state_dict().items()}))
        total = sum(n for n, _ in results)
        for key, tensor in state.items():
            if tensor.is_floating_point():
                mean = sum(n * result[key].double() for n, result in results) / total
                state[key] = mean.to(tensor.dtype)
            else:
                state[key] = torch.stack([result[key] for _, result in results]).amax(0)
    return state


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_fedavg_is_the_textbook_loop(images: Dataset, tiny: Make, alpha: float | None) -> None:
    run = Run(tiny(alpha=alpha, local_epochs=2, dense_format="contiguous"), data=images)
    assert all(part.size % run.config.batch != 1 for part in run.partition)
    rows = run.finish()
    expected = restate_fedavg(run.config, run, [row["sampled"] for row in rows[1:]])
    server = run.arms[0].federation.server
    actual = run.layout.scatter(server.floats, server.ints)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=2e-4, atol=2e-5, msg=key)


def test_same_seed_same_bits_and_other_seed_other_clients(images: Dataset, tiny: Make) -> None:
    runs = [Run(tiny(seed=seed), data=images) for seed in (5, 5, 6)]
    rows = [run.finish() for run in runs]
    floats = [run.arms[0].federation.server.floats.tobytes() for run in runs]
    assert floats[0] == floats[1]
    assert floats[0] != floats[2]
    assert [row["sampled"] for row in rows[0]] == [row["sampled"] for row in rows[1]]
    assert [row["accuracy"] for row in rows[0]] == [row["accuracy"] for row in rows[1]]
    assert any(len(row["sampled"]) == 3 for row in rows[0])


def test_bytes_are_those_of_the_messages(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(rounds=1), data=images)
    row = run.finish()[1]
    one = HEADER_BYTES + 4 * run.layout.float_count(None) + 8 * run.layout.int_count
    assert row["bytes_up"] == row["bytes_down"] == 3 * one


def test_training_learns(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(rounds=5, max_images=200, local_epochs=2, eval_images=200), data=images)
    rows = run.finish()
    assert rows[-1]["train_loss"] < 0.85 * rows[1]["train_loss"]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.1


class Tamper:
    """A link that changes what one client answers."""

    def __init__(self, run: Run, client: int, change: Callable[[bytes], bytes | list[bytes]]) -> None:
        self.inner, self.client, self.change = run.arms[0].clients, client, change

    def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
        reply = self.inner.turn(client, round, messages)
        if client == self.client and round == 2:
            changed = self.change(reply.messages[0])
            reply.messages = changed if isinstance(changed, list) else [changed]
        return reply


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
    }
    return encode(Kind.VALUES, **{**fields, **changes})


def with_nan(message: bytes) -> bytes:
    values = decode(message).values.copy()
    values[7] = np.nan
    return reencoded(message, values=values)


BAD_ANSWERS = {
    "nan": (with_nan, "not finite"),
    "infinite": (
        lambda m: reencoded(m, values=np.where(decode(m).values == decode(m).values.max(), np.inf, 0)),
        "not finite",
    ),
    "stale_round": (lambda m: reencoded(m, round=1), "round is 1, expected 2"),
    "another_client": (lambda m: reencoded(m, client=9), "client is '9'"),
    "another_model": (lambda m: reencoded(m, model_digest=bytes(32)), "model digest"),
    "another_mask": (lambda m: reencoded(m, mask_digest=b"\1" * 32), "mask digest"),
    "no_examples": (lambda m: reencoded(m, examples=0), "claims 0 examples"),
    "negative_examples": (lambda m: reencoded(m, examples=-5), "claims -5 examples"),
    "too_few_values": (lambda m: reencoded(m, values=decode(m).values[1:]), "number of values"),
    "integers_it_has_not": (lambda m: reencoded(m, ints=np.ones(2, np.int64)), "number of integers is 2"),
    "truncated": (lambda m: m[:-4], "truncated"),
    "oversized": (lambda m: m + m, "oversized"),
    "flipped_bit": (lambda m: m[:200] + bytes([m[200] ^ 4]) + m[201:], "checksum"),
    "empty": (lambda m: b"", "shorter than"),
    "other_version": (lambda m: m[:4] + struct.pack("<H", 2) + m[6:], "version 2"),
    "two_messages": (lambda m: [m, m], "expected one message, got 2"),
    "no_message": (lambda m: [], "expected one message, got 0"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_is_refused_and_the_round_goes_on(images: Dataset, tiny: Make, case: str) -> None:
    change, reason = BAD_ANSWERS[case]
    config = tiny(clients=3, sample=3, rounds=2, model="mlp", width=0.05)

    def federation_with(link_of: Callable[[Run], Any]) -> tuple[Federation, dict[str, Any]]:
        run = Run(config, data=images)
        federation = run.arms[0].federation
        federation._link = link_of(run)
        federation.choose_masks()
        federation.run_round()
        return federation, federation.run_round()

    class Absent(Tamper):
        def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
            if client == self.client and round == 2:
                raise ClientError("gone")
            return self.inner.turn(client, round, messages)

    tampered, row = federation_with(lambda run: Tamper(run, 1, change))
    without, other = federation_with(lambda run: Absent(run, 1, bytes))
    assert [refusal["client"] for refusal in row["refused"]] == [1]
    assert reason in row["refused"][0]["reason"]
    assert other["refused"] == [{"client": 1, "reason": "gone"}]
    assert tampered.server.floats.tobytes() == without.server.floats.tobytes()
    assert row["accuracy"] == other["accuracy"]
    assert row["examples"] == 2 * config.max_images


def test_a_round_without_any_good_answer_changes_nothing(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(clients=1, sample=1, rounds=2, model="mlp", width=0.05), data=images)
    federation = run.arms[0].federation
    federation._link = Tamper(run, 0, with_nan)
    federation.choose_masks()
    first = federation.run_round()
    before = federation.server.floats.copy()
    second = federation.run_round()
    assert len(second["refused"]) == 1
    np.testing.assert_array_equal(federation.server.floats, before)
    assert second["accuracy"] == first["accuracy"]


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


def test_last_batch_of_one_joins_its_neighbour(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(rounds=1, max_images=33, sample=1), data=images)
    row = run.finish()[1]
    assert (row["steps"], row["images"]) == (2, 33)
    assert len(row["time"]["step_ms"]) == 1


def test_global_generators_are_left_alone(images: Dataset, tiny: Make) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Run(tiny(rounds=1), data=images).finish()
    assert torch.equal(torch.rand(4), expected)
