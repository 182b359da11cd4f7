# SPDX-License-Identifier: Apache-2.0
"""The loop: equal to a slow restatement, exact in its bytes. Bad clients are in test_bad_clients.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.payload import HEADER_BYTES
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


def test_images_that_are_not_square_are_refused(tiny: Make) -> None:
    wide = torch.zeros(40, 1, 24, 32, dtype=torch.uint8)
    labels = torch.arange(40) % 10
    data = Dataset.from_arrays("wide", (wide, labels), (wide, labels), 10)
    with pytest.raises(ConfigError, match="--data wide: expected square images, got 24 x 32 pixels"):
        Run(tiny(), data=data)
