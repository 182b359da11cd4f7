# SPDX-License-Identifier: Apache-2.0
"""FedDST against its rules in plain dense torch, and what its server refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpai import pruning
from fedpai.data import Dataset
from fedpai.federation.client import ClientError, ClientMemory
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import HEADER_BYTES
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import derive
from fedpai.methods import feddst
from fedpai.methods.adjust import counts
from tests.fedpai.methods.restatement import (
    SERVER_OPT,
    Restatement,
    State,
    assert_uneven,
    by_parameter,
    keys_of,
)

Make = Callable[..., RunConfig]


def top(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """The highest of the candidates."""
    ranked = torch.where(among, scores.double(), -torch.inf).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[ranked[:count]] = True
    return mask.view(scores.shape)


def adjusted(dense: Restatement, masks: State, share: float, number: int, client: int) -> State:
    """Smallest weights out, largest gradients in, layer by layer."""
    run = dense.run
    model = create_model(run.config, run.data).double()
    model.load_state_dict(dense.state)
    draw = np.random.default_rng(derive(run.config.seed, "images to grow by", number, client))
    part = run.partition[client]
    x, y = run.data.batch(draw.choice(part, min(run.config.batch, part.size), replace=False))
    nn.functional.cross_entropy(model(x.double()), y).backward()
    new = {}
    for key, mask in masks.items():
        weight = model.get_parameter(key)
        kept = int(mask.sum())
        moved = round(share * kept)
        stay = top(weight.detach().abs(), kept - moved, mask)
        new[key] = stay | top(weight.grad.abs(), moved, ~stay)
    return new


def first_masks(run: Run) -> State:
    """ERK at random weights."""
    seed = derive(run.config.seed, "mask")
    return by_parameter(pruning.prune(create_model(run.config, run.data), run.config.sparsity, "erk", seed=seed))


def rounds(run: Run, sampled: list[list[int]], shares: list[float]) -> tuple[Restatement, State]:
    """The model and the mask after so many rounds, each of which moves its share of the weights."""
    dense, masks = Restatement(run), first_masks(run)
    kept = {key: int(mask.sum()) for key, mask in masks.items()}
    dense.change({}, masks)
    for number, (clients, share) in enumerate(zip(sampled, shares, strict=True), start=1):
        own = {client: adjusted(dense, masks, share, number, client) if share else masks for client in clients}
        answers = {client: dense.trained(number, client, own[client]) for client in clients}
        union = {key: torch.stack([mask[key] for mask in own.values()]).any(0) for key in masks}
        dense.change(masks, union)
        dense.step(dense.mean(answers, own))
        if share:
            masks = {key: top(dense.state[key].abs(), kept[key], held) for key, held in union.items()}
            dense.change(union, masks)
    return dense, masks


@pytest.mark.parametrize(("server_opt", "sample"), [("none", 3), ("avgm", 4), ("adam", 4), ("yogi", 4)])
def test_rounds_are_the_rules(small: Dataset, telling: Make, server_opt: str, sample: int) -> None:
    config = telling(method="feddst", rounds=4, adjust_every=1, sample=sample, **SERVER_OPT[server_opt])
    run = Run(config, data=small)
    assert_uneven(run)
    first = first_masks(run)
    rows = run.finish()
    # Nothing in round 1, then 0.3 / 2 (1 + cos(pi t / 2)) for t = 0 and 1, then nothing.
    dense, masks = rounds(run, [row["sampled"] for row in rows[1:]], [0.0, 0.3, 0.15, 0.0])
    server = run.arms[0].federation.server
    assert server.mask is not None
    moved = {}
    for key, mask in keys_of(server.mask).items():
        assert torch.equal(mask, masks[key]), key
        moved[key] = int((mask & ~first[key]).sum()) / int(mask.sum())
    assert sorted(key for key, share in moved.items() if share == 0) == ["features.0.weight"]  # dense under ERK
    assert 0.2 < moved["fc1.weight"] <= 0.45
    dense.assert_server(server)
    assert server.client_masks == {}
    assert all(row["refused"] == [] for row in rows)


def test_new_weights_start_at_zero_and_others_stay(few: Dataset, tiny: Make) -> None:
    """Where training changes nothing. One that is pruned and brought back at once keeps its value."""
    run = Run(tiny(method="feddst", adjust_every=1, rounds=2, lr=1e-30, weight_decay=0.0, momentum=0.0), data=few)
    federation = run.arms[0].federation
    federation.choose_masks()
    federation.run_round()
    before = federation.server.dense()[0]
    old = federation.server.mask
    federation.run_round()
    after, new = federation.server.dense()[0], federation.server.mask
    assert old is not None
    assert new is not None
    both = np.intersect1d(old.positions, new.positions)
    np.testing.assert_allclose(after[both], before[both], rtol=1e-6)
    assert np.abs(after[np.setdiff1d(new.positions, old.positions)]).max() < 1e-25
    assert counts(new) == counts(old)


def test_rate() -> None:
    config = RunConfig(method="feddst", rounds=40, adjust_every=5, adjust_rate=0.4)
    moved = {number: feddst.rate(config, number) for number in range(1, 41)}
    assert {number for number, share in moved.items() if share} == {2, 7, 12, 17}
    assert moved[2] == 0.4
    assert moved[12] == pytest.approx(0.2)
    assert not any(feddst.rate(RunConfig(rounds=40, adjust_rate=0.0), number) for number in range(1, 41))


def test_bytes(images: Dataset, tiny: Make) -> None:
    """Masks go up in a round of adjustment and down in the next; values are packed in all rounds."""
    run = Run(tiny(method="feddst", adjust_every=1, rounds=3, sample=4), data=images)
    rows = run.finish()
    server = run.arms[0].federation.server
    values = HEADER_BYTES + 4 * run.layout.float_count(server.mask) + 8 * run.layout.int_count
    up, down = ([row[key] - 4 * values for row in rows[1:]] for key in ("bytes_up", "bytes_down"))
    # Masks travel as a bitmap, or coded where that is smaller.
    bitmap = HEADER_BYTES + (run.layout.weight_count + 7) // 8
    assert rows[0]["bytes_up"] == rows[0]["bytes_down"] == 0
    assert [up[0], down[1], up[2]] == [0, 0, 0]
    for masks in (down[0], up[1], down[2]):
        assert 4 * HEADER_BYTES < masks <= 4 * bitmap


def otherwise(run: Run, client: int) -> list[bytes]:
    """What a client would send that moved a weight from one layer to another: a mask and values under it."""
    mask = run.arms[0].federation.server.mask
    assert mask is not None
    flags = mask.masks()
    for name, more in (("fc1", True), ("fc2", False)):
        flat = flags[name].view(-1)
        flat[(flat != more).nonzero()[0]] = more
    me = run.arms[0].clients._client(client, 2)
    me.memory = ClientMemory(MaskSet.from_masks(run.layout, flags))
    me.floats, me.ints = np.zeros(run.layout.float_count(me.memory.mask), np.float32), np.zeros(0, np.int64)
    return [me.mask_message(me.memory.mask), me.values_message()]


BAD = {
    "no_mask": (lambda sent, other: sent[1:], "expected a mask and a model, got 1 messages"),
    "wrong_order": (lambda sent, other: sent[::-1], "kind is 'VALUES', expected 'MASK'"),
    "mask_twice": (lambda sent, other: [sent[0], sent[0]], "kind is 'MASK', expected 'VALUES'"),
    "damaged_mask": (lambda sent, other: [sent[0][:-2] + b"xx", sent[1]], "checksum"),
    "values_of_another_mask": (lambda sent, other: [sent[0], other[1]], "mask digest"),
    "one_layer_too_full": (lambda sent, other: other, r"keeps \d+ weights of fc1, expected \d+"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused_and_the_client_goes_on(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, reason = BAD[case]
    config = tiny(method="feddst", adjust_every=2, clients=3, sample=3, rounds=3, model="mlp", width=0.1)
    run = Run(config, data=images)
    clients = run.arms[0].clients
    honest = clients.turn

    def turn(client: int, round: int, messages: list[bytes]) -> Any:
        reply = honest(client, round, messages)
        if (client, round) == (1, 2):
            reply.messages = change(reply.messages, otherwise(run, client))
        return reply

    monkeypatch.setattr(clients, "turn", turn)
    rows = run.finish()
    assert [refusal["client"] for refusal in rows[2]["refused"]] == [1]
    assert re.search(reason, rows[2]["refused"][0]["reason"])
    assert rows[3]["refused"] == []


def test_a_round_of_adjustment_without_any_answer(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients have changed their masks, the server has not; all are told again and the run goes on."""
    run = Run(tiny(method="feddst", adjust_every=2, sample=4, rounds=3, model="mlp", width=0.1), data=images)
    clients, server = run.arms[0].clients, run.arms[0].federation.server
    honest = clients.turn

    def turn(client: int, round: int, messages: list[bytes]) -> Any:
        reply = honest(client, round, messages)
        if round == 2:
            raise ClientError("gone")
        return reply

    monkeypatch.setattr(clients, "turn", turn)
    masks = []
    federation = run.arms[0].federation
    federation.choose_masks()
    for _ in range(3):
        row = federation.run_round()
        masks.append(server.mask)
        assert len(row["refused"]) == (4 if server.round == 2 else 0)
    assert masks[0] == masks[1] == masks[2]
