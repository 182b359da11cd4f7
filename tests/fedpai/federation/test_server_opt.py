# SPDX-License-Identifier: Apache-2.0
"""The server's optimisers in the default merge, against plain torch over the dense tensors of a state_dict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpai.cli import run as run_command
from fedpai.federation import server_opt
from fedpai.federation.bound import ModelPool
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.layout import Layout, MaskSet, pack, unpack
from fedpai.federation.server import Server, Update
from fedpai.methods.fedavg import FedAvg
from tests.fedpai.methods.restatement import ServerOptimiser, keys_of

EXAMPLES = [30, 7, 12, 51]
ROUNDS = 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)
    )


def random_mask(layout: Layout, seed: int, share: float = 0.4) -> MaskSet:
    rng = np.random.default_rng(seed)
    return MaskSet.from_positions(layout, np.flatnonzero(rng.random(layout.weight_count) < share))


def make_server(**settings: Any) -> Server:
    torch.manual_seed(0)
    model = network()
    layout = Layout.of(model)
    config = RunConfig(method="fedavg", clients=4, sample=4, **settings)
    pool = ModelPool(network, layout, torch.contiguous_format)
    return Server(config, layout, pool, *layout.gather(model.state_dict()))


def trained(server: Server, client: int, dense: np.ndarray) -> np.ndarray:
    """What a client might send: the global model and some noise. All but the packed floats is of no interest."""
    rng = np.random.default_rng((server.round, client))
    moved = dense + 0.1 * rng.standard_normal(dense.size).astype(np.float32)
    return pack(moved, server.mask_of(client), server.layout)


class Restated:
    """The same federation over dense float64 tensors, tensor by tensor."""

    def __init__(self, server: Server) -> None:
        self.parameters = {name for name, _ in network().named_parameters()}
        self.x = self.dense(server, server.floats, server.mask)
        self.optimiser = ServerOptimiser.of(server.config, self.x)

    @staticmethod
    def dense(server: Server, floats: np.ndarray, mask: MaskSet | None) -> dict[str, Tensor]:
        state = server.layout.scatter(unpack(floats, mask, server.layout), server.ints)
        return {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}

    def merge(self, answers: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        for key, x in self.x.items():
            top, bottom = torch.zeros_like(x), torch.zeros_like(x)
            for n, answer, masks in answers:
                kept = masks.get(key, torch.ones_like(x)).double()
                top += n * kept * answer[key]
                bottom += n * kept
            mean = torch.where(bottom > 0, top / bottom.clamp(min=1), x)
            self.x[key] = self.optimiser.stepped(key, x, mean) if key in self.parameters else mean

    def change(self, old: MaskSet, new: MaskSet) -> None:
        """Weights that leave lose their value and their state, and those that come in start anew."""
        before = keys_of(old)
        stays = {key: kept & before[key] for key, kept in keys_of(new).items()}
        self.x.update({key: self.x[key] * kept for key, kept in stays.items()})
        self.optimiser.move(stays)


def check(server: Server, expected: Restated) -> None:
    actual = Restated.dense(server, server.floats, server.mask)
    for key, tensor in expected.x.items():
        torch.testing.assert_close(actual[key], tensor, rtol=2e-5, atol=2e-6, msg=key)


@pytest.mark.parametrize("masks", ["dense", "shared", "personal", "changing"])
@pytest.mark.parametrize("rule", ["none", "avgm", "adam", "yogi"])
def test_three_rounds(rule: str, masks: str) -> None:
    settings = {} if rule == "none" else {"server_lr": 0.7 if rule == "avgm" else 0.02, "server_momentum": 0.8}
    server = make_server(server_opt=rule, **settings)
    if masks in ("shared", "changing"):
        server.set_mask(random_mask(server.layout, 0))
    if masks == "personal":
        server.set_client_masks({client: random_mask(server.layout, client, 0.2) for client in range(4)})
    expected, method = Restated(server), FedAvg(server.config)
    for number in range(1, ROUNDS + 1):
        server.round = number
        dense, _ = server.dense()
        answers, updates = [], []
        for client, n in enumerate(EXAMPLES):
            floats, mask = trained(server, client, dense), server.mask_of(client)
            updates.append(Update(client, n, floats=floats, ints=server.ints))
            answers.append((n, Restated.dense(server, floats, mask), keys_of(mask)))
        method.merge(server, updates)
        expected.merge(answers)
        check(server, expected)
        if masks == "changing":  # some weights leave, others come back
            before, after = server.mask, random_mask(server.layout, number)
            assert before is not None
            server.set_mask(after)
            expected.change(before, after)


@pytest.mark.parametrize("rule", ["avgm", "adam", "yogi"])
def test_running_statistics_take_the_mean_as_it_is(rule: str) -> None:
    server, plain = make_server(server_opt=rule, server_lr=0.3), make_server()
    for one in (server, plain):
        dense, _ = one.dense()
        updates = [Update(k, n, floats=trained(one, k, dense), ints=one.ints) for k, n in enumerate(EXAMPLES)]
        FedAvg(one.config).merge(one, updates)
    assert server.layout.statistics_count == 2 * (4 + 3)
    at = -server.layout.statistics_count
    np.testing.assert_array_equal(server.floats[at:], plain.floats[at:])
    assert not np.isclose(server.floats[:at], plain.floats[:at]).any()
    keys = [slot.key for slot in server.layout.others]
    assert [key.rpartition(".")[2] for key in keys[-4:]] == 2 * ["running_mean", "running_var"]


def test_state_is_kept_where_it_is_needed() -> None:
    server = make_server()
    assert server_opt.step(server, server.floats) is server.floats
    assert server.extra == {}
    server = make_server(server_opt="avgm")
    server_opt.step(server, server.floats)
    assert set(server.extra) == {server_opt.M}


def test_factors_need_an_optimiser() -> None:
    for key, value in (("server_lr", 0.5), ("server_momentum", 0.5)):
        asked = {"method": "fedavg", key: value}
        with pytest.raises(ConfigError, match=f"--{key.replace('_', '-')} means nothing without --server-opt"):
            run_command.configure(asked, asked)
        used = {**asked, "server_opt": "adam"}
        assert getattr(run_command.configure(used, used), key) == value
