# SPDX-License-Identifier: Apache-2.0
"""Momentum that a client keeps between its turns: packed, repacked with the mask, and only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpai.data import Dataset
from fedpai.federation.client import MOMENTUM, Client, ClientMemory
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import LayoutError, MaskSet
from fedpai.federation.runner import Run
from fedpai_kernels import optim
from tests.fedpai.federation.test_compaction import channel_masks
from tests.fedpai.federation.test_folder import StopAt, resume, start

Make = Callable[..., RunConfig]


def client_of(run: Run, memory: ClientMemory, round: int) -> Client:
    return Client(0, round, run.config, run.layout, run.data, run.partition[0], memory, run.pool)


def third(run: Run) -> MaskSet:
    return MaskSet.from_positions(run.layout, np.arange(0, run.layout.weight_count, 3))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("form", ["channels_last", "contiguous"])
def test_two_turns_are_one_long_one(images: Dataset, tiny: Make, sparse: bool, form: str) -> None:
    """A fresh optimiser in between would change the result; the one that goes on does not."""
    run = Run(tiny(dense_format=form), data=images)
    mask = third(run) if sparse else None
    batches = np.array_split(run.partition[0], 4)

    def after(turns: list[list[np.ndarray]], carry: bool) -> np.ndarray:
        memory = ClientMemory(mask)
        floats, ints = run.arms[0].federation.server.dense()
        floats = floats if mask is None else np.concatenate((floats[mask.positions], floats[run.layout.weight_count :]))
        for turn in turns:
            client = client_of(run, memory, 1)
            client.floats, client.ints = floats, ints
            client._batches = lambda epochs, turn=turn: iter(turn)
            client.fit(carry_momentum=carry)
            floats, ints = client.model_vectors()
        assert (MOMENTUM in memory.extra) == carry
        return floats

    whole = after([batches], carry=True)
    assert np.array_equal(after([batches[:2], batches[2:]], carry=True), whole)
    assert not np.allclose(after([batches[:2], batches[2:]], carry=False), whole, atol=1e-4)


def test_tightening_drops_momentum_with_the_weights(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(), data=images)
    memory = ClientMemory()
    client = client_of(run, memory, 1)
    client.floats, client.ints = run.arms[0].federation.server.dense()
    momentum = np.arange(run.layout.float_count(None), dtype=np.float32) + 1
    memory.extra[MOMENTUM] = momentum.copy()
    mask = third(run)
    client.remask(mask)
    others = momentum[run.layout.weight_count :]
    assert np.array_equal(memory.extra[MOMENTUM], np.concatenate((momentum[mask.positions], others)))
    tighter = MaskSet.from_positions(run.layout, mask.positions[1::2])
    server = run.arms[0].federation.server
    server.round = 1
    server.set_mask(tighter)
    client.receive([*server.mask_message(0), server.values_message(0)])  # the other way to a new mask
    assert np.array_equal(memory.extra[MOMENTUM], np.concatenate((momentum[tighter.positions], others)))
    client.remask(mask)  # and back: what was gone starts at 0
    back = memory.extra[MOMENTUM][: mask.kept]
    assert np.array_equal(back[1::2], momentum[tighter.positions])
    assert not back[::2].any()


@pytest.mark.parametrize("compact", [False, True])
def test_a_model_takes_momentum_and_gives_it_back(images: Dataset, tiny: Make, compact: bool) -> None:
    """Of removed channels there is none."""
    run = Run(tiny(), data=images)
    mask = MaskSet.from_masks(run.layout, channel_masks(run)) if compact else third(run)
    bound = run.pool.get(mask)
    parameters = [p for p in bound.model.parameters() if p.requires_grad]
    optimiser = optim.SGD(parameters, lr=0.1, momentum=0.9)
    assert not bound.read_momentum(optimiser).any()
    momentum = np.arange(run.layout.float_count(mask), dtype=np.float32) + 1
    bound.load_momentum(optimiser, momentum)
    again = bound.read_momentum(optimiser)
    assert set(again[again != momentum]) <= {0}
    assert np.count_nonzero(again) == sum(p.numel() for p in parameters)
    assert np.array_equal(again[: mask.kept], momentum[: mask.kept])
    assert [list(optimiser.state[p]) for p in parameters] == [["momentum_buffer"]] * len(parameters)
    with pytest.raises(LayoutError, match=rf"expected {momentum.size} float32 values, got \(3,\)"):
        bound.load_momentum(optimiser, momentum[:3])


def test_methods_that_do_not_ask_keep_none(images: Dataset, tiny: Make) -> None:
    kept: dict[str, Any] = {}
    for name in ("fedavg", "random", "fedsparsify-global"):
        run = Run(tiny(method=name, rounds=2, sample=4), data=images)
        run.finish()
        kept[name] = [memory.extra.keys() for memory in run.arms[0].clients.memories.values()]
    assert kept == {"fedavg": [set()] * 4, "random": [set()] * 4, "fedsparsify-global": [{MOMENTUM}] * 4}


@pytest.mark.parametrize("name", ["fedsparsify-global", "fedsparsify-local"])
def test_resuming_under_tightened_masks(images: Dataset, tiny: Make, tmp_path: Path, name: str) -> None:
    """Stopped in round 4, after two new masks; clients that were not sampled still have momentum under older ones."""
    config = tiny(method=name, rounds=4, sample=2)
    start(tmp_path / "whole", config, images).finish()
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", config, images, StopAt(20)).finish()
    run = resume(tmp_path / "cut", images)
    assert run.arms[0].done == 3
    masks = {None if memory.mask is None else memory.mask.digest for memory in run.arms[0].clients.memories.values()}
    assert len(masks) > 1
    run.finish()
    for file in (f"model-{name}.safetensors", f"checkpoint-{name}.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
