# SPDX-License-Identifier: Apache-2.0
"""What a client holds after the last round under personal masks: its part of the merged model, with statistics of its
own images; against plain dense torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import generator
from tests.fedpai.methods.restatement import keys_of

Make = Callable[..., RunConfig]


def held(run: Run, client: int) -> nn.Module:
    """The client's network in float64, its statistics the means of those of its batches."""
    server, config = run.arms[0].federation.server, run.config
    state: dict[str, Tensor] = run.layout.scatter(*server.dense())
    for key, flags in keys_of(server.mask_of(client)).items():
        state[key] = state[key] * flags
    model = create_model(config, run.data).double()
    model.load_state_dict(state)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}

    def look(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        found[norm].append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)))

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    order = generator(config.seed, "batches", config.rounds, client, 0).permutation(run.partition[client])
    with torch.no_grad():
        for begin in range(0, order.size, config.batch):
            model.train()(run.data.batch(order[begin : begin + config.batch])[0].double())
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.running_mean, norm.running_var = (sum(s) / len(s) for s in zip(*found[norm], strict=True))
    return model.eval()


def accuracy(run: Run, client: int) -> float:
    """On the client's own mix of classes."""
    x, y = run.data.batch(run.arms[0].federation._evaluator.indices, split="test")
    with torch.no_grad():
        hit = (held(run, client)(x.double()).argmax(1) == y).double()
    mix = torch.bincount(torch.as_tensor(run.data.train_labels[run.partition[client]]), minlength=10).double()
    known = torch.bincount(y, minlength=10) > 0
    each = torch.stack([hit[y == c].mean() if known[c] else torch.tensor(0.0) for c in range(10)])
    return float((mix * known * each).sum() / (mix * known).sum())


def personal(tiny: Make, data: Dataset, method: str) -> Run:
    settings: dict[str, Any] = {"mask_mode": "personal", "sparsity": 0.5, "max_images": 32, "eval_images": 200}
    run = Run(tiny(method=method, alpha=0.5, batch=8, lr=0.02, **settings), data=data)
    assert all(part.size % 8 != 1 for part in run.partition), "a batch of one would join its neighbour"
    return run


@pytest.mark.parametrize("method", ["fedpai-u", "fedpai-s"])
def test_the_accuracy_is_of_the_merged_model_with_own_statistics(few: Dataset, tiny: Make, method: str) -> None:
    run = personal(tiny, few, method)
    rows = run.finish()
    sizes = [part.size for part in run.partition]
    expected = np.average([accuracy(run, client) for client in range(4)], weights=sizes)
    assert [row["held_accuracy"] for row in rows[:-1]] == [None] * 3
    # One of 200 images may fall on the other side by rounding, in each client.
    assert rows[-1]["held_accuracy"] == pytest.approx(expected, abs=0.02)


def test_calibrating_changes_the_statistics_alone(few: Dataset, tiny: Make) -> None:
    run = personal(tiny, few, "fedpai-u")
    run.finish()
    federation = run.arms[0].federation
    for client in range(4):
        me = run.arms[0].clients._client(client, run.config.rounds)
        me.receive(federation.method.send(federation.server, client))
        before = me.model().state_dict()
        momenta = [m.momentum for m in me.bound().model.modules() if isinstance(m, nn.BatchNorm2d)]
        me.calibrate()
        assert [m.momentum for m in me.bound().model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta == [0.1] * 4
        after, wanted = me.model().state_dict(), held(run, client).state_dict()
        for key, tensor in after.items():
            if key.endswith(("running_mean", "running_var")):
                assert not torch.equal(tensor, before[key])
                torch.testing.assert_close(tensor.double(), wanted[key], rtol=1e-3, atol=1e-4)
            elif not key.endswith("num_batches_tracked"):
                assert torch.equal(tensor, before[key])


def test_nothing_to_calibrate(few: Dataset, tiny: Make) -> None:
    """A network without norms, and a client with one image."""
    run = Run(tiny(method="fedavg", model="mlp"), data=few)
    for indices in (run.partition[0], run.partition[0][:1]):
        me = run.arms[0].clients._client(0, 0)
        me.indices = indices
        me.receive(run.arms[0].federation.method.send(run.arms[0].federation.server, 0))
        before = me.model_vectors()[0].copy()
        me.calibrate()
        assert np.array_equal(me.model_vectors()[0], before)


def test_without_personal_masks_nothing_is_held(few: Dataset, tiny: Make) -> None:
    for settings in ({"method": "fedavg"}, {"method": "fedpai-u", "mask_mode": "shared"}):
        rows = Run(tiny(rounds=1, **settings), data=few).finish()
        assert [row["held_accuracy"] for row in rows] == [None, None]
