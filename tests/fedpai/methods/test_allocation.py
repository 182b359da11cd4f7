# SPDX-License-Identifier: Apache-2.0
"""Runs with an allocation of their own: which masks are agreed on, and which settings and masks are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedpai import pruning
from fedpai.data import Dataset
from fedpai.federation.config import ALLOCATIONS, ConfigError, RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import PayloadError
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import derive
from fedpai.methods.fedpai_u import FedPaiU
from fedpai.pruning.allocation import NAMES
from tests.fedpai.methods.restatement import proposed

Make = Callable[..., RunConfig]


def counts_of(run: Run, client: int) -> dict[str, int]:
    mask = run.arms[0].federation.server.mask_of(client)
    assert mask is not None
    return {name: int(kept.sum()) for name, kept in mask.masks().items()}


def expected_counts(config: RunConfig, images: Dataset) -> dict[str, int]:
    """Of the library's masks by magnitude: counts do not depend on the criterion."""
    model = create_model(config, images)
    masks = pruning.prune(model, config.sparsity, "magnitude", allocation=config.allocation)
    return {name: int(kept.sum()) for name, kept in masks.items()}


@pytest.mark.parametrize("allocation", ["erk", "flops", "time:0.5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fedpai-u", "criterion": "grasp"},
        {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal"},
        {"method": "fedpai-u", "criterion": "synflow"},
        {"method": "magnitude"},
        {"method": "random"},
    ],
    ids=["shared", "personal", "synflow", "magnitude", "random"],
)
def test_layers_keep_what_the_allocation_says(
    images: Dataset, tiny: Make, settings: dict[str, Any], allocation: str
) -> None:
    config = tiny(**settings, allocation=allocation, rounds=1)
    run = Run(config, data=images)
    rows = run.finish()
    assert all(row["refused"] == [] for row in rows)
    for client in range(config.clients):
        assert counts_of(run, client) == expected_counts(config, images)


def test_the_shared_mask_is_the_best_of_the_averaged_scores(images: Dataset, tiny: Make) -> None:
    config = tiny(method="fedpai-u", criterion="snip", allocation="time:0.5", rounds=1)
    run = Run(config, data=images)
    run.finish()
    model = create_model(config, images)
    scores = []
    for client, part in enumerate(run.partition):
        batch = pruning.balanced_batch(images, part, 10, seed=derive(0, "scoring images", 0, client))
        scores.append(pruning.scores(model, "snip", data=batch))
    average = pruning.average_scores(scores, [part.size for part in run.partition])
    counts = expected_counts(config, images)
    mask = run.arms[0].federation.server.mask_of(0)
    assert mask is not None
    for name, kept in mask.masks().items():
        best = average[name].flatten().argsort(descending=True, stable=True)[: counts[name]]
        assert torch.equal(kept.flatten().nonzero().flatten(), best.sort().values)


def test_a_personal_mask_of_another_allocation_is_refused(images: Dataset, tiny: Make) -> None:
    config = tiny(method="fedpai-u", criterion="snip", mask_mode="personal", allocation="time:0.5")
    run = Run(config, data=images)
    server, method = run.arms[0].federation.server, run.arms[0].federation.method
    mask = MaskSet.from_masks(
        server.layout, pruning.prune(server.model(), config.sparsity, "magnitude", allocation="erk")
    )
    message = proposed(server, mask)
    with pytest.raises(PayloadError, match=r"mask of \S+ keeps \d+ weights, the agreed allocation \d+"):
        method.accept_proposal(server, 2, [message])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": "layer"}, "--allocation: got 'layer', expected one of global, uniform, erk, flops, time"),
        ({"allocation": "time:0"}, "--allocation: got 'time:0', expected a positive number after 'time:'"),
        ({"allocation": "time", "criterion": "erk"}, "--allocation: criterion 'erk' is an allocation itself"),
        (
            {"allocation": "time:0.01"},
            "--allocation time:0.01: allocation: 'time:0.01' is less than 7643 weights can take",
        ),
        (
            {"allocation": "time", "budget": "flops"},
            "--allocation time: allocation: 'time' shares out weights, expected another one with budget 'flops'",
        ),
        (
            {"allocation": "flops", "structure": "channel"},
            "--allocation flops: allocation: got 'flops', expected one of global, uniform for structure 'channel'",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["shared", "personal"])
def test_refusals_come_before_the_clients_work(
    images: Dataset,
    tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
    mode: str,
) -> None:
    monkeypatch.setattr(FedPaiU, "propose", lambda *_: pytest.fail("a client was asked"))
    with pytest.raises(ConfigError, match=message):
        Run(tiny(method="fedpai-u", mask_mode=mode, **changes), data=images).finish()


def test_the_command_line_offers_what_there_is() -> None:
    assert ALLOCATIONS == NAMES
