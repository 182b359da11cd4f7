# SPDX-License-Identifier: Apache-2.0
"""SpaFL against its formulas written out, and what it sends, keeps and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpai import models
from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import Layout, module_of
from fedpai.federation.payload import NO_MASK, Kind, PayloadError, decode, encode
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import generator
from fedpai.methods import thresholds
from fedpai.methods.spafl import ramp
from fedpai.methods.thresholds import Threshold
from tests.fedpai.methods.restatement import assert_uneven

Make = Callable[..., RunConfig]
Vectors = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 7, 3, bias=False), nn.Linear(12, 7, bias=False)])
def test_gradients_are_the_formulas(layer: nn.Module) -> None:
    """dL/dtau_i = -sum_j G_ij - c exp(-tau_i), dL/dw_ij = m_i g_ij + sign(w_ij) / n_in sum_l G_il; in float64."""
    torch.manual_seed(1)
    layer = layer.double()
    weight = layer.weight.detach().clone()
    mean = weight.abs().flatten(1).mean(1)
    tau = torch.quantile(mean, 0.4) + 0.001 * torch.randn(7, dtype=torch.float64)
    mask = (mean - tau > 0).double()
    assert 0 < mask.sum() < 7
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64) if weight.dim() == 4 else torch.randn(5, 12).double()
    upstream = torch.randn_like(layer(x))
    penalty = 0.3

    shaped = mask.view(-1, *[1] * (weight.dim() - 1))
    masked = nn.Parameter(weight * shaped)
    layer.weight = masked
    (layer(x) * upstream).sum().backward()
    g = masked.grad
    assert g is not None
    big_g = (g * weight).flatten(1).sum(1)
    expected_tau = -big_g - penalty * torch.exp(-tau)
    fan_in = weight[0].numel()
    expected_weight = shaped * g + weight.sign() / fan_in * big_g.view(shaped.shape)

    layer.weight = nn.Parameter(weight.clone())
    threshold = Threshold(tau.clone())
    parametrize.register_parametrization(layer, "weight", threshold)
    ((layer(x) * upstream).sum() + penalty * threshold.values.neg().exp().sum()).backward()
    torch.testing.assert_close(threshold.values.grad, expected_tau, rtol=1e-12, atol=1e-12)
    actual = layer.parametrizations.weight.original.grad
    torch.testing.assert_close(actual, expected_weight, rtol=1e-12, atol=1e-12)


def test_a_layer_that_would_keep_a_hundredth_starts_anew() -> None:
    weight = torch.full((200, 3), 0.5)
    two, three = torch.full((200,), 0.6), torch.full((200,), 0.6)
    two[:2], three[:3] = 0.4, 0.4
    collapsed, alive = Threshold(two), Threshold(three)
    assert torch.equal(collapsed(weight), weight)
    assert not collapsed.values.any()
    assert alive(weight).count_nonzero() == 9
    assert alive.values.detach().max() == pytest.approx(0.6)


def test_a_filter_at_its_threshold_is_dropped() -> None:
    weight = torch.tensor([[0.5, -0.25], [0.5, -0.75], [1.0, 1.0]])
    kept = Threshold(torch.tensor([0.375, 0.625, 0.5]))(weight)
    assert kept.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_weights_follow_their_thresholds() -> None:
    """w - change sign(sum w) / D; D is 2 x 3 for this kernel, whatever its input channels, and 6 for the layer."""
    model = nn.Sequential(nn.Conv2d(4, 2, (2, 3), bias=False), nn.Flatten(), nn.Linear(6, 2))
    layout = Layout.of(model)
    floats, _ = layout.gather(model.state_dict())
    signs = [1.0, -1.0, 1.0, 0.0]
    rows = [24 * [0.5], 24 * [-0.5], [1.0, 1.0, -0.5, -0.5, -0.5, 0.5], [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]]
    floats[: layout.weight_count] = np.concatenate(rows)
    before = floats.copy()
    change = np.array([0.75, 0.75, -1.5, 9.0], np.float32)
    moved = thresholds.follow(layout, floats, change)
    steps = [np.full(len(row), c * s / 6) for row, c, s in zip(rows, change, signs, strict=True)]
    np.testing.assert_array_equal(moved[: layout.weight_count], np.concatenate(rows) - np.concatenate(steps))
    np.testing.assert_array_equal(moved[layout.weight_count :], floats[layout.weight_count :])
    np.testing.assert_array_equal(floats, before)


def test_ramp() -> None:
    assert [round(ramp(number), 3) for number in (1, 2, 3)] == [0.007, 0.993, 1.0]
    assert ramp(10_000) == 1


# -------------------------------------------------------------------------------------------- restatement


class Restated:
    """One client in plain torch and float64: raw weights, thresholds, and gradients from the formulas."""

    def __init__(self, run: Run, client: int) -> None:
        self.run, self.client = run, client
        self.model = create_model(run.config, run.data).double()
        self.names = [module_of(slot) for slot in run.layout.weights]
        self.raw = {name: self.layer(name).weight.detach().clone() for name in self.names}
        self.tau = {name: torch.zeros(len(raw), dtype=torch.float64) for name, raw in self.raw.items()}
        self.seen = {name: tau.clone() for name, tau in self.tau.items()}
        self.resets = 0

    def layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def apply_masks(self) -> Vectors:
        masks = {}
        for name, raw in self.raw.items():
            mean = raw.abs().flatten(1).mean(1)
            mask = (mean - self.tau[name] > 0).double()
            if mask.mean() <= 0.01:
                self.tau[name].zero_()
                self.resets += 1
                mask = (mean > 0).double()
            masks[name] = mask.view(-1, *[1] * (raw.dim() - 1))
            self.layer(name).weight.data.copy_(raw * masks[name])
        return masks

    def turn(self, sent: Vectors, number: int) -> None:
        config = self.run.config
        for name, raw in self.raw.items():
            sign = raw.flatten(1).sum(1).sign()
            area = raw.shape[2] * raw.shape[3] if raw.dim() == 4 else raw.shape[1]
            step = (sent[name] - self.seen[name]) * sign / area
            raw -= step.view(-1, *[1] * (raw.dim() - 1))
            self.tau[name] = sent[name].clone()
        self.seen = {name: tau.clone() for name, tau in sent.items()}
        c = config.threshold_penalty / (1 + math.exp(5 - 10 * (number - 1)))
        weights = {self.layer(name).weight for name in self.names}
        rest = [p for p in self.model.parameters() if p not in weights]
        leaves = [*self.raw.values(), *self.tau.values()]
        optimiser = torch.optim.SGD(
            [*leaves, *rest], config.lr, config.momentum, weight_decay=config.weight_decay
        )
        part = self.run.partition[self.client]
        order = generator(config.seed, "batches", number, self.client, 0).permutation(part)
        self.model.train()
        for batch in np.split(order, range(config.batch, part.size, config.batch)):
            masks = self.apply_masks()
            x, y = self.run.data.batch(batch)
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(x.double()), y).backward()
            for name, raw in self.raw.items():
                g, mask = self.layer(name).weight.grad, masks[name]
                big_g = (g * raw).flatten(1).sum(1)
                self.tau[name].grad = -big_g - c * torch.exp(-self.tau[name])
                raw.grad = mask * g + raw.sign() / raw[0].numel() * big_g.view(mask.shape)
            optimiser.step()


def restate(run: Run, sampled: list[list[int]]) -> tuple[dict[int, Restated], Vectors]:
    clients = {client: Restated(run, client) for client in range(run.config.clients)}
    shared = {name: tau.clone() for name, tau in clients[0].tau.items()}
    for number, chosen in enumerate(sampled, start=1):
        for client in chosen:
            clients[client].turn(shared, number)
        shared = {
            name: torch.stack([clients[client].tau[name] for client in chosen]).mean(0) for name in shared
        }
    return clients, shared


def test_three_rounds_are_the_formulas(few: Dataset, tiny: Make) -> None:
    config = tiny(method="spafl", lr=0.0005, weight_decay=0.4, alpha=0.3, max_images=None, threshold_penalty=50.0)
    run = Run(config, data=few)
    assert_uneven(run)
    rows = run.finish()
    clients, shared = restate(run, [row["sampled"] for row in rows[1:]])
    assert sum(client.resets for client in clients.values()) > 0
    close: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-5}
    server = run.arms[0].federation.server
    expected = torch.cat(list(shared.values()))
    torch.testing.assert_close(torch.from_numpy(server.extra["thresholds"]).double(), expected, **close)
    densities = set()
    for client, memory in run.arms[0].clients.memories.items():
        restated = clients[client]
        state = run.layout.scatter(memory.extra["floats"], memory.extra["ints"])
        for name, raw in restated.raw.items():
            torch.testing.assert_close(state.pop(f"{name}.weight").double(), raw, **close, msg=name)
        for key, tensor in state.items():
            torch.testing.assert_close(tensor.double(), restated.model.state_dict()[key].double(), **close, msg=key)
        tau = torch.cat(list(restated.tau.values()))
        torch.testing.assert_close(torch.from_numpy(memory.extra["trained"]).double(), tau, **close)
        masks = restated.apply_masks()
        masked = thresholds.masked(run.layout, memory.extra["floats"], memory.extra["trained"])
        kept = torch.cat([(masks[name] * raw).flatten() for name, raw in restated.raw.items()])
        np.testing.assert_array_equal(masked[: run.layout.weight_count] != 0, (kept != 0).numpy())
        densities.add(int(kept.count_nonzero()))
    assert len(densities) > 1
    assert max(densities) < run.layout.weight_count


# ------------------------------------------------------------------------------- rows, messages and refusals


def test_rows_have_no_global_model(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="spafl", threshold_penalty=0.5), data=images)
    rows = run.finish()
    assert all(row[key] is None for row in rows for key in ("accuracy", "test_loss", "global_density"))
    assert all(0 <= row["personal_accuracy"] <= 1 for row in rows[1:])
    assert [row["held_accuracy"] is None for row in rows] == [True, True, True, False]
    assert rows[0]["bytes_up"] == rows[0]["bytes_down"] == 0
    size = len(run.arms[0].federation.server.thresholds_message(np.zeros(run.layout.channel_count, np.float32)))
    assert all(row["bytes_up"] == row["bytes_down"] == 3 * size for row in rows[1:])
    found = [rows[3]["density"]] + [memory.extra for memory in run.arms[0].clients.memories.values()]
    kept = [
        np.count_nonzero(thresholds.masked(run.layout, extra["floats"], extra["trained"])[: run.layout.weight_count])
        for client, extra in enumerate(found[1:])
        if client in rows[3]["sampled"]
    ]
    assert found[0] == pytest.approx(np.mean(kept) / run.layout.weight_count)


@pytest.mark.parametrize("method", ["spafl", "local"])
def test_all_clients_are_scored_at_the_end(images: Dataset, tiny: Make, method: str) -> None:
    """With everybody in every round, the last round's clients are all clients and their models those they hold."""
    run = Run(tiny(method=method, sample=4, rounds=2, threshold_penalty=0.5), data=images)
    rows = run.finish()
    assert rows[2]["held_accuracy"] == rows[2]["personal_accuracy"]


@pytest.mark.parametrize("method", ["spafl", "feddst", "fedpai-s", "ssfl"])
def test_any_wire(images: Dataset, tiny: Make, method: str) -> None:
    """Values rounded to 16 bits and messages deflated: nothing is refused, and thresholds stay as they are."""
    settings: dict[str, Any] = {"method": method, "adjust_every": 1, "model": "mlp", "width": 0.2}
    plain = Run(tiny(**settings), data=images)
    coded = Run(tiny(**settings, wire="bf16", compress="deflate"), data=images)
    rows, coded_rows = plain.finish(), coded.finish()
    assert all(row["refused"] == [] for row in coded_rows)
    sent, before = (sum(row["bytes_up"] for row in part) for part in (coded_rows, rows))
    if method == "spafl":
        servers = [run.arms[0].federation.server.extra["thresholds"] for run in (plain, coded)]
        np.testing.assert_array_equal(*servers)
        assert sent <= before
    else:
        assert sent < before


@pytest.mark.parametrize(
    ("name", "size", "width", "channels", "weights", "filters"),
    [("lenet-20-50-500", 28, 1.0, 1, 430_500, 580), ("resnet18", 32, 0.5, 3, 2_792_800, 2410)],
)
def test_message_sizes(name: str, size: int, width: float, channels: int, weights: int, filters: int) -> None:
    """742 times smaller than dense for the published LeNet, by the values in real buffers."""
    model = models.create(name, in_channels=channels, image_size=size, width=width)
    layout = Layout.of(model)
    about: dict[str, Any] = {"round": 1, "client": 0, "examples": 9, "model_digest": layout.digest}
    dense = np.ones(layout.weight_count, np.float32)
    values = encode(Kind.VALUES, values=dense, mask_digest=NO_MASK, **about)
    few = encode(Kind.THRESHOLDS, values=np.ones(layout.channel_count, np.float32), mask_digest=NO_MASK, **about)
    assert (layout.weight_count, layout.channel_count) == (weights, filters)
    ratio = decode(values).values.nbytes / decode(few).values.nbytes
    assert ratio == weights / filters
    if name == "lenet-20-50-500":
        assert ratio == pytest.approx(742, abs=0.5)
        assert layout.float_count(None) == layout.weight_count  # no bias, no norm: that is the whole model


BAD = {
    "too_few": ({"values": np.ones(3, np.float32)}, "number of values is 3"),
    "nan": ({"values": "nan"}, "not finite"),
    "stale_round": ({"round": 1}, "round is 1, expected 2"),
    "another_client": ({"client": 3}, "client is '3', expected '1'"),
    "another_model": ({"model_digest": bytes(32)}, "model digest"),
    "with_a_mask": ({"mask_digest": b"\1" * 32}, "mask digest"),
    "no_examples": ({"examples": 0}, "claims 0 examples"),
    "integers": ({"ints": np.ones(1, np.int64)}, "number of integers is 1"),
    "values": ({"kind": Kind.VALUES}, "kind is 'VALUES', expected 'THRESHOLDS'"),
    "twice": ("twice", "expected one message, got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused_and_the_round_goes_on(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes, reason = BAD[case]
    run = Run(tiny(method="spafl", clients=3, sample=3, model="mlp", width=0.05, rounds=2), data=images)
    clients, server = run.arms[0].clients, run.arms[0].federation.server
    honest = clients.turn

    def turn(client: int, round: int, messages: list[bytes]) -> Any:
        reply = honest(client, round, messages)
        if (client, round) != (1, 2):
            return reply
        if changes == "twice":
            reply.messages *= 2
            return reply
        sent = decode(reply.messages[0])
        fields: dict[str, Any] = {
            "round": 2, "client": 1, "examples": 5, "model_digest": sent.model_digest, "mask_digest": NO_MASK,
            "values": sent.values, "kind": Kind.THRESHOLDS, **changes,
        }  # fmt: skip
        if isinstance(fields["values"], str):
            fields["values"] = np.where(sent.values == sent.values.max(), np.nan, sent.values)
        reply.messages = [encode(fields.pop("kind"), **fields)]
        return reply

    monkeypatch.setattr(clients, "turn", turn)
    rows = run.finish()
    assert [refusal["client"] for refusal in rows[2]["refused"]] == [1]
    assert reason in rows[2]["refused"][0]["reason"]
    others = [clients.memories[client].extra["trained"].astype(np.float64) for client in (0, 2)]
    np.testing.assert_allclose(server.extra["thresholds"], np.mean(others, 0), rtol=1e-6)


def test_thresholds_that_a_client_refuses(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="spafl", rounds=1), data=images)
    server, clients = run.arms[0].federation.server, run.arms[0].clients
    server.round = 1
    good = server.thresholds_message(np.zeros(run.layout.channel_count, np.float32))
    for message, reason in (
        (server.thresholds_message(np.zeros(4, np.float32)), "number of values is 4"),
        (good[:-1], "truncated"),
        (good[:-1] + b"\1", "checksum"),
    ):
        with pytest.raises(PayloadError, match=reason):
            clients.turn(0, 1, [message])
    other = Run(tiny(method="magnitude", rounds=1), data=images).arms[0].federation
    other.choose_masks()
    other.server.round = 1
    foreign = [*other.server.mask_message(0), other.server.values_message(0)]
    for messages, kinds in ((foreign, "MASK and VALUES"), ([good, good], "THRESHOLDS and THRESHOLDS")):
        with pytest.raises(PayloadError, match=f"expected THRESHOLDS, got {kinds}"):
            clients.turn(0, 1, messages)
    assert clients.memories[0].mask is None
    with pytest.raises(PayloadError, match="was sent no thresholds"):
        clients.turn(0, 1, [])
    assert clients.memories[0].extra == {}


def test_a_client_that_diverges_keeps_its_model(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(method="spafl", model="mlp", width=0.05, lr=1e30, rounds=1), data=images)
    row = run.finish()[1]
    assert len(row["refused"]) == 3
    assert all("diverged" in refusal["reason"] for refusal in row["refused"])
    assert row["personal_accuracy"] is None
    assert all(memory.extra == {} for memory in run.arms[0].clients.memories.values())
    assert not run.arms[0].federation.server.extra["thresholds"].any()


def test_the_pool_is_left_as_it_was(images: Dataset, tiny: Make) -> None:
    """Dense models are shared with the other method of a run: no threshold may stay on them."""
    alone = Run(tiny(method="fedavg", rounds=1), data=images).finish()
    beside = Run(tiny(method="spafl", baseline="fedavg", rounds=1), data=images).finish()
    last = [row for row in beside if row["method"] == "fedavg"][-1]
    assert (last["accuracy"], last["test_loss"]) == (alone[-1]["accuracy"], alone[-1]["test_loss"])
