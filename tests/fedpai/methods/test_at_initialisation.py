# SPDX-License-Identifier: Apache-2.0
"""SSFL and FedPaI-S: which masks are agreed on before training, and training under them, in plain dense torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpai import pruning
from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.payload import HEADER_BYTES, PayloadError
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import derive
from tests.fedpai.methods.restatement import State, by_parameter, restated
from tests.fedpai.methods.test_methods import Masks, check, scoring_batch

Make = Callable[..., RunConfig]


# ------------------------------------------------------------------------------------------------------ SSFL


def saliency(run: Run, client: int) -> dict[str, Tensor]:
    """|g w| on one minibatch, divided by its sum as SNIP does."""
    model = create_model(run.config, run.data)
    part = run.partition[client]
    draw = np.random.default_rng(derive(run.config.seed, "scoring images", 0, client))
    x, y = run.data.batch(draw.choice(part, min(run.config.batch, part.size), replace=False))
    nn.functional.cross_entropy(model(x), y).backward()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    scores = {name: (weight.grad * weight.detach()).abs() for name, weight in weights.items()}
    total = sum(score.sum().item() for score in scores.values())
    return {name: score / total for name, score in scores.items()}


def test_ssfl(small: Dataset, telling: Make) -> None:
    # The criterion, mask mode and structure of a run mean nothing to it.
    config = telling(method="ssfl", criterion="grasp", mask_mode="personal", structure="4x1")
    run = Run(config, data=small)
    rows = run.finish()
    n = sum(part.size for part in run.partition)
    shares = [part.size / n for part in run.partition]
    found = [saliency(run, client) for client in range(4)]
    mean = {name: sum(p * s[name].double() for p, s in zip(shares, found, strict=True)) for name in found[0]}
    ranked = torch.cat([score.flatten() for score in mean.values()]).sort(descending=True).values
    threshold = ranked[round(0.2 * len(ranked)) - 1]
    masks = {name: score >= threshold for name, score in mean.items()}
    check(run, dict.fromkeys(range(4), masks), rows)
    assert rows[0]["bytes_up"] == 4 * (HEADER_BYTES + 4 * run.layout.weight_count)
    assert all(row["personal_accuracy"] is None for row in rows)


# -------------------------------------------------------------------------------------------- coarse scores


def understood(run: Run, client: int) -> np.ndarray:
    """What the server understands of a client's scores, in float64."""
    model = create_model(run.config, run.data)
    seed = derive(run.config.seed, "mask", 0, client)
    scores = pruning.scores(model, "grasp", data=scoring_batch(run, client), seed=seed)
    vector = torch.cat([score.flatten() for score in scores.values()]).double().numpy()
    sizes = np.sort(np.abs(vector))[::-1]
    step = float(np.float32(np.float32(sizes[round((1 - run.config.sparsity) * sizes.size) - 1]) / 4))
    return np.rint(vector / step) * step


def test_the_mask_is_that_of_the_rounded_scores(small: Dataset, telling: Make) -> None:
    config = telling(method="fedpai-u", scores="coarse", rounds=1)
    run = Run(config, data=small)
    rows = run.finish()
    weights = np.array([part.size for part in run.partition])
    mean = sum(n * understood(run, client) for client, n in enumerate(weights)) / weights.sum()
    kept = round((1 - config.sparsity) * mean.size)
    ranked = np.sort(mean)[::-1]
    mask = run.arms[0].federation.server.mask
    assert mask is not None
    assert mask.kept == kept
    chosen = np.zeros(mean.size, bool)
    chosen[mask.positions] = True
    # Rounding to float32 may swap scores that are equal but for it.
    assert mean[chosen].min() >= ranked[kept - 1] - 1e-6 * abs(ranked[0])
    assert mean[~chosen].max() <= ranked[kept] + 1e-6 * abs(ranked[0])
    assert 0 < rows[0]["bytes_up"] < 4 * (HEADER_BYTES + 2 * run.layout.weight_count + 4)


# -------------------------------------------------------------------------------------------------- FedPaI-S


# Whose entries go with the output channels of a layer of this network, and which.
NORM = ("weight", "bias", "running_mean", "running_var")
BESIDE = {
    **{f"features.{at}": [f"features.{at + 1}.{part}" for part in NORM] for at in (0, 3, 7, 10)},
    **{name: [f"{name}.bias"] for name in ("fc1", "fc2", "classifier")},
}


def settle(answer: State, received: State, masks: State) -> None:
    """What belongs to removed channels comes back as it was received."""
    for name, keys in BESIDE.items():
        gone = ~masks[f"{name}.weight"].flatten(1).any(1)
        for key in keys:
            answer[key][gone] = received[key][gone]


def own_masks(run: Run, client: int) -> Masks:
    seed, data = derive(run.config.seed, "mask", 0, client), scoring_batch(run, client)
    model = create_model(run.config, run.data)
    return pruning.prune(model, run.config.sparsity, "grasp", data=data, seed=seed, structure="channel")


@pytest.mark.parametrize(
    ("mode", "budget", "rounds"), [("shared", "weights", 3), ("shared", "flops", 1), ("personal", "weights", 3)]
)
def test_fedpai_s(small: Dataset, telling: Make, mode: str, budget: str, rounds: int) -> None:
    # The criterion and structure of a run mean nothing to it.
    config = telling(
        method="fedpai-s", mask_mode=mode, budget=budget, rounds=rounds, criterion="snip", structure="4x1"
    )
    run = Run(config, data=small)
    rows = run.finish()
    server = run.arms[0].federation.server
    if mode == "shared":
        model = create_model(config, small)
        masks = pruning.prune(model, config.sparsity, "synflow", structure="channel", budget=budget)
        masks_of = dict.fromkeys(range(4), masks)
        assert rows[0]["bytes_up"] == rows[0]["bytes_down"] == 0
        assert all(row["personal_accuracy"] is None for row in rows)
    else:
        masks_of = {client: own_masks(run, client) for client in range(4)}
        assert len({server.mask_of(client) for client in range(4)}) > 1
        assert all(0 <= row["personal_accuracy"] <= 1 for row in rows[1:])
    for client, masks in masks_of.items():
        mask = server.mask_of(client)
        assert mask is not None
        assert all(torch.equal(flags, masks[name]) for name, flags in mask.masks().items())
    assert all(row["refused"] == [] for row in rows)
    keys = {client: by_parameter(masks) for client, masks in masks_of.items()}
    restated(run, keys, [row["sampled"] for row in rows[1:]], settle).assert_server(server)


@pytest.mark.parametrize("mode", ["shared", "personal"])
def test_what_trains_is_smaller(images: Dataset, tiny: Make, mode: str) -> None:
    """Layers have the kept channels only, and every weight of them."""
    run = Run(tiny(method="fedpai-s", mask_mode=mode, rounds=1), data=images)
    run.finish()
    mask = run.arms[0].federation.server.mask_of(0)
    assert mask is not None
    model = run.pool.get(mask).model
    parameters = sum(module.weight.numel() for module in model.modules() if hasattr(module, "plan"))
    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    parameters += sum(module.weight.numel() for module in dense.values())
    assert parameters == mask.kept < run.layout.weight_count


def test_single_weights_are_refused(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="fedpai-s", mask_mode="personal"), data=images)
    server, method = run.arms[0].federation.server, run.arms[0].federation.method
    other = Run(tiny(method="fedpai-u", mask_mode="personal"), data=images)
    reply = other.arms[0].clients.turn(0, 0, [server.values_message(0)])
    with pytest.raises(PayloadError, match="does not keep the channels of the layers around it"):
        method.accept_proposal(server, 0, reply.messages)


@pytest.mark.parametrize("mode", ["shared", "personal"])
def test_a_sparsity_without_channels(images: Dataset, tiny: Make, mode: str) -> None:
    with pytest.raises(ConfigError, match=r"--sparsity 0\.9999: .*less than the \d+ of one channel"):
        Run(tiny(method="fedpai-s", mask_mode=mode, sparsity=0.9999), data=images)
