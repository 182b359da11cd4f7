# SPDX-License-Identifier: Apache-2.0
"""FedSparsify against its formulas in plain dense torch, its schedule, and what its server refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedpai.data import Dataset
from fedpai.federation.bound import BoundModel
from fedpai.federation.client import Client
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import PayloadError
from fedpai.federation.runner import Run
from fedpai.federation.server import Server, Update
from fedpai.methods.fedsparsify import sparsity_after
from tests.fedpai.methods.restatement import (
    SERVER_OPT,
    Restatement,
    State,
    assert_largest,
    assert_uneven,
    keys_of,
)

Make = Callable[..., RunConfig]


def spied(run: Run) -> list[tuple[MaskSet | None, list[Update]]]:
    """Fills up with what the server merges round by round: its mask before, and the updates."""
    seen: list[tuple[MaskSet | None, list[Update]]] = []
    method = run.arms[0].federation.method
    merge = method.merge

    def spy(server: Server, updates: list[Update]) -> None:
        seen.append((server.mask, updates))
        merge(server, updates)

    method.merge = spy
    return seen


def kept_after(run: Run, number: int) -> int:
    """The schedule, for 3 rounds: s_f (1 - ((3 - t) / 2)^3)."""
    config = run.config
    t = number // config.prune_every * config.prune_every
    gone = 0.0 if t < 2 else config.sparsity * (1 - ((3 - t) / 2) ** 3)
    return round((1 - gone) * run.layout.weight_count)


def masks_after(run: Run, seen: list[tuple[MaskSet | None, list[Update]]]) -> list[MaskSet | None]:
    return [mask for mask, _ in seen[1:]] + [run.arms[0].federation.server.mask]


GLOBAL = [("none", 3, 1), ("none", 3, 2), ("avgm", 4, 1), ("adam", 4, 1), ("yogi", 4, 1)]
LOCAL = [("none", 1, 1), ("none", 3, 1), ("none", 4, 1), ("none", 4, 2), ("avgm", 4, 1), ("adam", 4, 1), ("yogi", 4, 1)]


@pytest.mark.parametrize(("server_opt", "sample", "every"), GLOBAL)
def test_global_against_its_formulas(small: Dataset, telling: Make, server_opt: str, sample: int, every: int) -> None:
    config = telling(method="fedsparsify-global", sample=sample, prune_every=every, **SERVER_OPT[server_opt])
    run = Run(config, data=small)
    assert_uneven(run)
    seen = spied(run)
    rows = run.finish()
    server, dense = run.arms[0].federation.server, Restatement(run)
    before: State = {}
    for number, mask in enumerate(masks_after(run, seen), start=1):
        clients = rows[number]["sampled"]
        dense.step(dense.mean({client: dense.trained(number, client, before, carry=True) for client in clients}))
        if kept_after(run, number) == run.layout.weight_count:
            assert mask is None
            continue
        after = keys_of(mask)
        assert_largest(after, dense.state, before, kept_after(run, number))
        dense.change(before, after)
        before = after
    dense.assert_server(server)
    assert rows[3]["global_density"] == pytest.approx(0.2 if every == 1 else 0.3, abs=1e-4)


@pytest.mark.parametrize("rule", ["all", "voters"])
@pytest.mark.parametrize(("server_opt", "sample", "every"), LOCAL)
def test_local_against_its_formulas(
    few: Dataset, telling: Make, rule: str, server_opt: str, sample: int, every: int
) -> None:
    settings = {"merge_rule": rule, "sample": sample, "prune_every": every, **SERVER_OPT[server_opt]}
    run = Run(telling(method="fedsparsify-local", **settings), data=few)
    assert_uneven(run)
    seen = spied(run)
    rows = run.finish()
    server, dense = run.arms[0].federation.server, Restatement(run)
    before: State = {}
    for number, ((held, updates), mask) in enumerate(zip(seen, masks_after(run, seen), strict=True), start=1):
        clients = rows[number]["sampled"]
        assert [update.client for update in updates] == clients
        answers = {client: dense.trained(number, client, before, carry=True) for client in clients}
        wanted = min(kept_after(run, number), run.layout.weight_count if held is None else held.kept)
        own = {}
        for update in updates:
            assert (update.mask is None) == (wanted == (run.layout.weight_count if held is None else held.kept))
            own[update.client] = keys_of(held if update.mask is None else update.mask)
            if update.mask is not None:
                assert_largest(own[update.client], answers[update.client], before, wanted)
        for client, answer in answers.items():
            answer.update({key: answer[key] * kept for key, kept in own[client].items()})
        dense.step(dense.mean(answers, own if rule == "voters" else None))
        if updates[0].mask is not None:
            after = {key: sum(own[c][key].int() for c in clients) >= max(1, sample // 2) for key in own[clients[0]]}
            assert all(torch.equal(flags, after[key]) for key, flags in keys_of(mask).items())
            dense.change(before, after)
            before = after
    dense.assert_server(server)
    assert all(row["refused"] == [] for row in rows)


def test_schedule() -> None:
    """The figures of the released code's settings: s_f = 0.9 in 200 rounds."""
    assert sparsity_after(100, 200, 0.9) == pytest.approx(0.786, abs=5e-4)
    assert sparsity_after(200, 200, 0.9) == 0.9
    assert [sparsity_after(t, 200, 0.9) for t in (0, 1)] == [0, 0]
    shares = [sparsity_after(t, 200, 0.9) for t in range(1, 201)]
    assert all(one < other for one, other in pairwise(shares))
    tens = [sparsity_after(t, 200, 0.9, every=10) for t in range(201)]
    assert tens[:10] == [0] * 10
    assert all(tens[t] == sparsity_after(t // 10 * 10, 200, 0.9) for t in range(201))


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_gone_stays_gone(few: Dataset, tiny: Make, every: int) -> None:
    run = Run(tiny(method="fedsparsify-global", rounds=6, prune_every=every, lr=0.2), data=few)
    seen = spied(run)
    rows = run.finish()
    masks = masks_after(run, seen)
    kept = [run.layout.weight_count if mask is None else mask.kept for mask in masks]
    shares = [sparsity_after(t, 6, 0.8, every) for t in range(1, 7)]
    assert kept == [round((1 - share) * run.layout.weight_count) for share in shares]
    assert [row["global_density"] for row in rows[1:]] == [count / run.layout.weight_count for count in kept]
    for one, other in pairwise(masks[1:]):
        assert one is not None
        assert other is not None
        assert set(other.positions) <= set(one.positions)
    assert len(run.pool._kept) == 2, "models of masks that are gone stay in memory"
    floats = run.arms[0].federation.server.dense()[0]
    assert masks[-1] is not None
    assert not np.delete(floats[: run.layout.weight_count], masks[-1].positions).any()


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
def test_masks_travel_when_they_change(few: Dataset, tiny: Make, name: str) -> None:
    run = Run(tiny(method=name, rounds=4, prune_every=2, sample=4), data=few)
    seen, turn = spied(run), run.arms[0].clients.turn
    sent: dict[int, list[bytes]] = {number: [] for number in range(1, 5)}
    answered: dict[int, list[bytes]] = {number: [] for number in range(1, 5)}

    def listen(client: int, round: int, messages: list[bytes]) -> Any:
        reply = turn(client, round, messages)
        sent[round] += messages
        answered[round] += reply.messages
        return reply

    run.arms[0].clients.turn = listen
    rows = run.finish()
    before = [mask for mask, _ in seen]
    pruned = [any(update.mask is not None for update in updates) for _, updates in seen]
    for number in range(1, 5):
        changed = number > 1 and before[number - 1] != before[number - 2]
        assert len(sent[number]) == (8 if changed else 4)
        assert len(answered[number]) == (8 if pruned[number - 1] else 4)
        assert rows[number]["bytes_down"] == sum(map(len, sent[number]))
        assert rows[number]["bytes_up"] == sum(map(len, answered[number]))
    assert [mask is None for mask in before] == [True, True, False, False]
    assert before[3] == before[2] or name == "fedsparsify-local"
    # With two votes of four, more may stay than anyone has kept, which is taken away after the next round.
    assert pruned[:2] == [False, name == "fedsparsify-local"]


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
def test_models_of_old_masks_are_let_go(few: Dataset, tiny: Make, name: str) -> None:
    """Nobody trains under them again, and near the start each is as large as the dense one."""
    run = Run(tiny(method=name, sample=4, rounds=4), data=few)
    run.finish()
    mask = run.arms[0].federation.server.mask
    assert mask is not None
    assert set(run.pool._kept) == {None, mask.digest}


def exact(run: Run, seed: int) -> np.ndarray:
    """Weights of few different magnitudes, and the other floats."""
    draw = np.random.default_rng(seed)
    return draw.integers(-9, 10, run.layout.float_count(None)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_exact_size_and_ties(few: Dataset, tiny: Make, seed: int) -> None:
    """Of equal magnitudes the first stay, in the order of the layout; then the same inside the mask that is left."""
    run = Run(tiny(method="fedsparsify-global"), data=few)
    method, layout, floats = run.arms[0].federation.method, run.layout, exact(run, seed)
    size = np.abs(floats[: layout.weight_count])
    for slot in layout.weights:  # which stay because every layer keeps one
        size[slot.offset + int(np.argmax(size[slot.offset : slot.stop]))] = np.inf
    ranked = np.argsort(-size, kind="stable")
    mask = None
    for number in (2, 3):
        packed = floats if mask is None else np.concatenate((floats[mask.positions], floats[layout.weight_count :]))
        mask = method.tightened(number, packed, mask, layout)
        count = kept_after(run, number)
        assert mask.kept == count
        assert np.array_equal(mask.positions, np.sort(ranked[:count]))
    assert method.tightened(3, floats[: mask.kept + layout.other_count], mask, layout) is mask


def test_a_vote_leaves_every_layer_a_weight(few: Dataset, tiny: Make) -> None:
    """Where no weight of a layer has two of four votes, the first of those with most votes stays."""
    run = Run(tiny(method="fedsparsify-local", model="mlp", width=0.05, sample=4), data=few)
    server, method, layout = run.arms[0].federation.server, run.arms[0].federation.method, run.layout
    last = layout.weights[-1]
    shared = np.arange(last.offset)
    updates = []
    for client in range(4):
        mask = MaskSet.from_positions(layout, np.append(shared, last.offset + 7 - client))
        floats = np.full(layout.float_count(mask), client + 1.0, np.float32)
        updates.append(Update(client, 10, floats, server.ints, mask=mask))
    method.merge(server, updates)
    assert server.mask is not None
    assert server.mask.positions[last.offset :].tolist() == [last.offset + 4]
    assert server.floats[: last.offset] == pytest.approx(2.5)
    assert server.floats[last.offset] == 1.0  # client 3 alone, with a quarter of the images


def pruning_round(few: Dataset, tiny: Make) -> tuple[Run, list[bytes]]:
    """A run at the end of its second round, and an answer of client 0 that fits there."""
    run = Run(tiny(method="fedsparsify-local", rounds=3, sample=4), data=few)
    arm = run.arms[0]
    for number in (0, 1):
        run._round(arm, number)
    server = arm.federation.server
    server.round = 2
    return run, arm.clients.turn(0, 2, arm.federation.method.send(server, 0)).messages


def test_a_fitting_answer_is_accepted(few: Dataset, tiny: Make) -> None:
    run, messages = pruning_round(few, tiny)
    update = run.arms[0].federation.method.accept(run.arms[0].federation.server, 0, messages)
    assert update.mask is not None
    assert update.mask.kept == kept_after(run, 2)


def other_answer(run: Run, change: Callable[[np.ndarray], np.ndarray]) -> list[bytes]:
    """What client 0 would have answered with other positions in its mask."""
    arm = run.arms[0]
    method, server = arm.federation.method, arm.federation.server
    answers: list[bytes] = []

    def answer(client: Client) -> list[bytes]:
        mask = method.tightened(2, client.floats, client.memory.mask, client.layout)
        other = MaskSet.from_positions(run.layout, change(mask.positions))
        answers.extend((client.mask_message(other), client.values_message(other)))
        return answers

    method.answer = answer
    arm.clients.turn(0, 2, method.send(server, 0))
    return answers


def one_more(positions: np.ndarray) -> np.ndarray:
    free = np.setdiff1d(np.arange(positions[-1]), positions)
    return np.union1d(positions, free[:1])


@pytest.mark.parametrize(("change", "more"), [(lambda p: p[1:], -1), (one_more, 1)])
def test_a_mask_of_another_size_is_refused(
    few: Dataset, tiny: Make, change: Callable[[np.ndarray], np.ndarray], more: int
) -> None:
    run, _ = pruning_round(few, tiny)
    arm, kept = run.arms[0], kept_after(run, 2)
    message = f"payload mask keeps {kept + more} weights, the schedule {kept} after this round"
    with pytest.raises(PayloadError, match=message):
        arm.federation.method.accept(arm.federation.server, 0, other_answer(run, change))


def test_a_mask_that_grows_back_is_refused(few: Dataset, tiny: Make) -> None:
    run, _ = pruning_round(few, tiny)
    arm = run.arms[0]
    server = arm.federation.server
    server.set_mask(MaskSet.from_positions(run.layout, np.arange(3, run.layout.weight_count)))
    answer = other_answer(run, lambda positions: np.append(0, positions[1:]))
    with pytest.raises(PayloadError, match="brings back weights that were dropped before"):
        arm.federation.method.accept(server, 0, answer)


@pytest.mark.parametrize("part", [0, 1])
def test_a_mask_or_values_alone_are_refused(few: Dataset, tiny: Make, part: int) -> None:
    run, messages = pruning_round(few, tiny)
    arm = run.arms[0]
    with pytest.raises(PayloadError, match="expected a mask and the values under it, got 1 messages"):
        arm.federation.method.accept(arm.federation.server, 0, [messages[part]])


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
def test_a_lost_pruning_round_is_made_up_for(few: Dataset, tiny: Make, name: str) -> None:
    """Nothing of round 2 arrives. Clients and server still agree on the mask, and round 3 prunes for both."""
    run = Run(tiny(method=name, rounds=4, sample=4), data=few)
    turn = run.arms[0].clients.turn

    def lossy(client: int, round: int, messages: list[bytes]) -> Any:
        reply = turn(client, round, messages)
        if round == 2:
            reply.messages = [message[:-1] for message in reply.messages]
        return reply

    run.arms[0].clients.turn = lossy
    rows = run.finish()
    assert [len(row["refused"]) for row in rows] == [0, 0, 4, 0, 0]
    assert rows[2]["global_density"] == 1
    assert rows[3]["global_density"] < 0.5


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
def test_a_client_that_diverges_is_refused_once(few: Dataset, tiny: Make, name: str) -> None:
    """The momentum of the turn that ran away does not spoil the next one."""
    run = Run(tiny(method=name, rounds=3, sample=4), data=few)
    method = run.arms[0].federation.method

    def diverge(client: Client) -> None:
        def blow_up(bound: BoundModel) -> None:
            next(bound.model.parameters()).grad.mul_(np.inf)

        client.fit(carry_momentum=True, adjust=blow_up if (client.id, client.round) == (2, 2) else None)

    method.train = diverge
    rows = run.finish()
    assert [[refusal["client"] for refusal in row["refused"]] for row in rows] == [[], [], [2], []]
    expected = "not finite" if name == "fedsparsify-global" else "pruning failed: scores: features.0 has"
    assert expected in rows[2]["refused"][0]["reason"]


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "--rounds 1: {name} would first prune after round 2"),
        ({"rounds": 3, "prune_every": 4}, "--rounds 3: {name} would first prune after round 4"),
        ({"sparsity": 0.99999, "model": "mlp", "width": 0.05}, "--sparsity 0.99999: sparsity: "),
    ],
)
def test_refused_settings(few: Dataset, tiny: Make, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.format(name=name)):
        Run(tiny(method=name, **changes), data=few)


def test_unpruned_it_is_fedavg_with_momentum(few: Dataset, tiny: Make) -> None:
    """Sparsity 0: the mask never comes, whatever the rounds."""
    run = Run(tiny(method="fedsparsify-global", sparsity=0.0, rounds=1), data=few)
    other = Run(tiny(method="fedavg", rounds=1), data=few)
    assert run.finish()[1]["global_density"] == 1
    other.finish()
    ours, theirs = run.arms[0].federation.server, other.arms[0].federation.server
    assert ours.mask is None
    assert np.array_equal(ours.floats, theirs.floats)
