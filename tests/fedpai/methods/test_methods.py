# SPDX-License-Identifier: Apache-2.0
"""Each method against its formulas in plain dense torch: masks multiplied in, tensors averaged one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpai import methods, pruning
from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.layout import Layout, MaskSet
from fedpai.federation.payload import HEADER_BYTES, PayloadError
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import derive
from fedpai.methods.base import MethodError
from tests.fedpai.methods.restatement import assert_uneven, by_parameter, proposed, restated

Make = Callable[..., RunConfig]
Masks = dict[str, Tensor]


def scoring_batch(run: Run, client: int) -> tuple[Tensor, Tensor]:
    seed = derive(run.config.seed, "scoring images", 0, client)
    return pruning.balanced_batch(run.data, run.partition[client], 10, seed=seed)


def own_masks(run: Run, client: int) -> Masks:
    config = run.config
    seed = derive(config.seed, "mask", 0, client)
    model = create_model(config, run.data)
    data = scoring_batch(run, client)
    return pruning.prune(model, config.sparsity, config.criterion, data=data, seed=seed)


def averaged_masks(run: Run) -> Masks:
    """The mask of the highest sum_k n_k s_k / sum_k n_k."""
    model = create_model(run.config, run.data)
    totals: dict[str, Tensor] = {}
    for client, part in enumerate(run.partition):
        scores = pruning.scores(model, run.config.criterion, data=scoring_batch(run, client))
        for name, score in scores.items():
            totals[name] = (
                totals.get(name, torch.zeros(score.shape, dtype=torch.float64)) + part.size * score.double()
            )
    count = sum(part.size for part in run.partition)
    means = {name: (total / count).float() for name, total in totals.items()}
    return pruning.masks_from_scores(means, run.config.sparsity)


def check(run: Run, masks_of: dict[int, Masks], rows: list[dict[str, Any]]) -> None:
    assert_uneven(run)
    server = run.arms[0].federation.server
    for client, masks in masks_of.items():
        mask = server.mask_of(client)
        assert mask is not None
        for name, flags in mask.masks().items():
            assert torch.equal(flags, masks[name]), (client, name)
    keys = {client: by_parameter(masks) for client, masks in masks_of.items()}
    restated(run, keys, [row["sampled"] for row in rows[1:]]).assert_server(server)


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_fedpai_u_shared(few: Dataset, telling: Make, criterion: str) -> None:
    run = Run(telling(method="fedpai-u", criterion=criterion), data=few)
    rows = run.finish()
    if criterion == "synflow":
        model = create_model(run.config, run.data)
        masks = pruning.prune(model, run.config.sparsity, criterion, seed=derive(0, "mask"))
    else:
        masks = averaged_masks(run)
    check(run, dict.fromkeys(range(4), masks), rows)
    assert rows[0]["bytes_up"] == (
        0 if criterion == "synflow" else 4 * (HEADER_BYTES + 4 * run.layout.weight_count)
    )
    assert rows[1]["personal_accuracy"] is None


@pytest.mark.parametrize("criterion", ["grasp", "random"])
def test_fedpai_u_personal(few: Dataset, telling: Make, criterion: str) -> None:
    config = telling(method="fedpai-u", criterion=criterion, mask_mode="personal", sample=2)
    run = Run(config, data=few)
    rows = run.finish()
    masks_of = {client: own_masks(run, client) for client in range(4)}
    assert len({run.arms[0].federation.server.mask_of(client) for client in range(4)}) == 4
    check(run, masks_of, rows)
    assert all(0 <= row["personal_accuracy"] <= 1 for row in rows[1:])
    # Round 0: the dense model down, a mask up.
    assert rows[0]["bytes_up"] == sum(mask_bytes(run, client) for client in range(4))


def mask_bytes(run: Run, client: int) -> int:
    """Length of a message with the client's mask, which is never above that of a bitmap."""
    server = run.arms[0].federation.server
    server.informed.discard(client)
    (message,) = server.mask_message(client)
    assert len(message) <= HEADER_BYTES + (run.layout.weight_count + 7) // 8
    return len(message)


@pytest.mark.parametrize("name", ["random", "magnitude"])
def test_fixed_masks(few: Dataset, telling: Make, name: str) -> None:
    run = Run(telling(method=name), data=few)
    rows = run.finish()
    model = create_model(run.config, run.data)
    masks = pruning.prune(model, run.config.sparsity, name, seed=derive(0, "mask"))
    check(run, dict.fromkeys(range(4), masks), rows)


def test_mask_travels_once_and_values_packed(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="magnitude", sample=4), data=images)
    rows = run.finish()
    server = run.arms[0].federation.server
    values = HEADER_BYTES + 4 * run.layout.float_count(server.mask) + 8 * run.layout.int_count
    assert rows[0]["bytes_up"] == rows[0]["bytes_down"] == 0
    assert rows[1]["bytes_down"] == 4 * (values + mask_bytes(run, 0))
    assert rows[2]["bytes_down"] == rows[2]["bytes_up"] == 4 * values


def test_uplink_of_resnet18_at_98_percent() -> None:
    """What a client sends, against what it sends under dense FedAvg, from the sizes alone."""
    from fedpai import models

    layout = Layout.of(models.create("resnet18", in_channels=1))
    kept = pruning.kept_count(layout.weight_count, 0.98)
    mask = MaskSet.from_positions(layout, np.arange(kept))
    ours = HEADER_BYTES + 4 * layout.float_count(mask) + 8 * layout.int_count
    dense = HEADER_BYTES + 4 * layout.float_count(None) + 8 * layout.int_count
    assert ours / dense <= 0.022


def test_a_client_with_one_class_still_scores(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="fedpai-u", mask_mode="personal", rounds=1), data=images)
    labels = images.train_labels.numpy()
    run.partition[2] = np.flatnonzero(labels == 3)[:40]
    row = run.finish()[0]
    assert row["refused"] == []


def test_refused_proposals_sit_out(images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tiny(method="fedpai-u", mask_mode="personal", sample=4, rounds=1), data=images)
    turn = run.arms[0].clients.turn

    def damaged(client: int, round: int, messages: list[bytes]) -> Any:
        reply = turn(client, round, messages)
        if client == 1 and round == 0:
            reply.messages = [reply.messages[0][:-1]]
        return reply

    monkeypatch.setattr(run.arms[0].clients, "turn", damaged)
    rows = run.finish()
    assert rows[0]["refused"][0]["client"] == 1
    assert rows[1]["sampled"] == [0, 2, 3]


def test_a_mask_of_another_size_is_refused(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="fedpai-u", mask_mode="personal"), data=images)
    server, method = run.arms[0].federation.server, run.arms[0].federation.method
    generous = Run(tiny(method="fedpai-u", mask_mode="personal", sparsity=0.5), data=images)
    reply = generous.arms[0].clients.turn(0, 0, [server.values_message(0)])
    with pytest.raises(PayloadError, match=r"mask keeps \d+ weights, the agreed sparsity keeps"):
        method.accept_proposal(server, 0, reply.messages)


def test_nobody_proposes(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="fedpai-u"), data=images)
    with pytest.raises(MethodError, match="no client proposed"):
        run.arms[0].federation.method.agree(run.arms[0].federation.server, [])


def test_a_sparsity_that_leaves_nothing(images: Dataset, tiny: Make) -> None:
    for name in ("magnitude", "fedpai-u"):
        with pytest.raises(ConfigError, match=r"--sparsity 0.99999: "):
            Run(tiny(method=name, sparsity=0.99999, model="mlp", width=0.05), data=images).finish()


def test_unknown_method_lists_the_known_ones(tiny: Make) -> None:
    with pytest.raises(ConfigError, match="unknown --method 'nope', expected one of: fedavg, feddst"):
        methods.create("nope", tiny())
    assert methods.names() == [
        "fedavg",
        "feddst",
        "fedpai-s",
        "fedpai-u",
        "fedprox",
        "fedsparsify-global",
        "fedsparsify-local",
        "local",
        "magnitude",
        "random",
        "spafl",
        "ssfl",
    ]


def test_a_mask_that_empties_a_layer_is_refused(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="fedpai-u", mask_mode="personal", model="mlp", width=0.05), data=images)
    server = run.arms[0].federation.server
    first = server.layout.weights[0]
    mask = MaskSet.from_positions(server.layout, np.arange(first.stop))
    message = proposed(server, mask)
    with pytest.raises(PayloadError, match="keeps no weight of " + server.layout.weights[1].key):
        server.read_mask(2, message)
