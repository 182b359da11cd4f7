# SPDX-License-Identifier: Apache-2.0
"""Runs whose masks have a structure: which masks are agreed on, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedpai import pruning
from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import PayloadError
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import derive
from tests.fedpai.methods.restatement import proposed

Make = Callable[..., RunConfig]
Masks = dict[str, torch.Tensor]

STRUCTURES = {"4x1": 0.8, "4x4-taps": 0.8, "channel": 0.8, "2:4": 0.5, "fan-in": 0.8}


def masks_of(run: Run, client: int) -> Masks:
    mask = run.arms[0].federation.server.mask_of(client)
    assert mask is not None
    return mask.masks()


def equal(one: Masks, two: Masks) -> bool:
    return all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("budget", ["weights", "flops"])
def test_one_mask_of_averaged_scores(images: Dataset, tiny: Make, structure: str, budget: str) -> None:
    config = tiny(
        method="fedpai-u",
        criterion="snip",
        structure=structure,
        budget=budget,
        sparsity=STRUCTURES[structure],
    )
    run = Run(config, data=images)
    rows = run.finish()
    model = create_model(config, images)
    scores = []
    for client, part in enumerate(run.partition):
        batch = pruning.balanced_batch(images, part, 10, seed=derive(0, "scoring images", 0, client))
        scores.append(pruning.scores(model, "snip", data=batch))
    average = pruning.average_scores(scores, [part.size for part in run.partition])
    expected = pruning.structured_masks(model, average, config.sparsity, structure=structure, budget=budget)
    assert equal(masks_of(run, 0), expected)
    assert all(row["refused"] == [] for row in rows)
    final = run.arms[0].federation.server.dense()[0]
    assert not final[: run.layout.weight_count][
        ~torch.cat([m.flatten() for m in expected.values()]).numpy()
    ].any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_personal_masks(images: Dataset, tiny: Make, structure: str) -> None:
    config = tiny(
        method="fedpai-u",
        criterion="grasp",
        mask_mode="personal",
        structure=structure,
        sparsity=STRUCTURES[structure],
        rounds=1,
    )
    run = Run(config, data=images)
    rows = run.finish()
    assert [row["refused"] for row in rows] == [[], []]
    for client in range(4):
        choice = pruning.chooser(create_model(config, images), config.sparsity, structure=structure)
        choice.check(masks_of(run, client))
    assert not equal(masks_of(run, 0), masks_of(run, 1))


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_masks_that_the_server_chooses(images: Dataset, tiny: Make, method: str) -> None:
    config = tiny(method=method, structure="4x1", rounds=1)
    run = Run(config, data=images)
    run.finish()
    expected = pruning.prune(
        create_model(config, images), config.sparsity, method, seed=derive(0, "mask"), structure="4x1"
    )
    assert equal(masks_of(run, 0), expected)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            "4x1",
            r"payload mask of features\.0: structure: the mask is not 4x1: the block of output channels 0 to 3",
        ),
        (
            "fan-in",
            r"payload mask of features\.0: structure: the mask is not fan-in: output channel \d+ keeps",
        ),
        ("channel", r"payload mask of features\.0 does not keep the channels of the layers around it"),
        ("2:4", r"payload mask of features\.3 keeps more than 2 of 4"),
    ],
)
def test_a_mask_of_another_structure_is_refused(
    images: Dataset, tiny: Make, structure: str, message: str
) -> None:
    """Clients that prune single weights, where blocks were agreed on."""
    settings: dict[str, Any] = {"mask_mode": "personal", "sparsity": STRUCTURES[structure]}
    run = Run(tiny(method="fedpai-u", structure=structure, **settings), data=images)
    server, method = run.arms[0].federation.server, run.arms[0].federation.method
    other = Run(tiny(method="fedpai-u", **settings), data=images)
    reply = other.arms[0].clients.turn(0, 0, [server.values_message(0)])
    with pytest.raises(PayloadError, match=message):
        method.accept_proposal(server, 0, reply.messages)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_mask_above_the_budget_is_refused(images: Dataset, tiny: Make, structure: str) -> None:
    settings: dict[str, Any] = {"mask_mode": "personal", "sparsity": STRUCTURES[structure]}
    run = Run(tiny(method="fedpai-u", structure=structure, **settings), data=images)
    server, method = run.arms[0].federation.server, run.arms[0].federation.method
    everything = MaskSet.from_masks(server.layout, {})
    message = proposed(server, everything)
    with pytest.raises(
        PayloadError, match=r"mask keeps \d+, the agreed sparsity at most|keeps more than 2 of 4"
    ):
        method.accept_proposal(server, 2, [message])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "2:4"}, "--sparsity 0.8: sparsity: got 0.8, but structure 2:4 removes 0.5"),
        ({"structure": "512x4"}, "--structure 512x4: structure: a block of 512x4 is larger than every layer"),
        (
            {"structure": "channel", "criterion": "erk"},
            "--criterion erk: allocation: got 'erk', expected one of",
        ),
        ({"structure": "8x", "sparsity": 0.5}, "--structure: got '8x', expected 'weight'"),
    ],
)
def test_refusals(images: Dataset, tiny: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Run(tiny(method="fedpai-u", **changes), data=images).finish()
