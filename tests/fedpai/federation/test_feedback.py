# SPDX-License-Identifier: Apache-2.0
"""Error feedback: nothing that rounding takes is lost, on either way, under masks that change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai import methods
from fedpai.data import Dataset
from fedpai.federation.client import Client
from fedpai.federation.config import RunConfig
from fedpai.federation.feedback import RESIDUAL, move_residual, with_feedback
from fedpai.federation.layout import Layout, MaskSet
from fedpai.federation.payload import DType, PayloadError, decode
from fedpai.federation.runner import Run
from fedpai.methods.base import Method, MethodError

Make = Callable[..., RunConfig]

HALVES = {"bf16": (DType.BFLOAT16, torch.bfloat16), "fp16": (DType.FLOAT16, torch.float16)}
WIRES = pytest.mark.parametrize("wire", HALVES)


def half(values: np.ndarray, wire: str) -> np.ndarray:
    return torch.from_numpy(values).to(HALVES[wire][1]).float().numpy()


# -- the arithmetic ------------------------------------------------------------------------------------------


@WIRES
@settings(max_examples=50, deadline=None)
@given(rounds=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_sum_of_what_was_sent_tracks_the_sum_of_what_was_meant(wire: str, rounds: int, seed: int) -> None:
    """Values are multiples of 2^-16 below 16, so that every sum here is exact: the difference is the last residual."""
    dtype, _ = HALVES[wire]
    draw = np.random.default_rng(seed)
    extra: dict[str, np.ndarray] = {}
    meant, sent = np.zeros(30), np.zeros(30)
    for _ in range(rounds):
        values = (draw.integers(-(2**18), 2**18, 30) / 2.0**16).astype(np.float32)
        travels = with_feedback(extra, values, 5, dtype)
        np.testing.assert_array_equal(travels[25:], values[25:])
        np.testing.assert_array_equal(half(travels[:25], wire), travels[:25])
        meant += values
        sent += travels
        spacing = np.abs(travels[:25]) * 2.0 ** (-7 if wire == "bf16" else -10)
        assert (np.abs(extra[RESIDUAL]) <= np.maximum(spacing / 2, 2.0**-25)).all()
    np.testing.assert_array_equal(meant[:25] - sent[:25], extra[RESIDUAL])
    np.testing.assert_array_equal(meant[25:], sent[25:])


@WIRES
def test_steps_below_the_last_place_add_up(wire: str) -> None:
    """Around 1 the next number is 2^-7 (or 2^-10) away; steps of a sixteenth of that would each be rounded off."""
    step = 2.0 ** (-11 if wire == "bf16" else -14)
    extra: dict[str, np.ndarray] = {}
    model = np.ones(3, np.float32)
    for _ in range(160):
        model = with_feedback(extra, model + np.float32(step), 0, HALVES[wire][0])
    assert np.abs(model - (1 + 160 * step)).max() <= 8 * step
    assert half(np.ones(3, np.float32) + np.float32(step), wire).tolist() == [1, 1, 1]


def test_float32_is_left_alone() -> None:
    extra: dict[str, np.ndarray] = {}
    values = np.array([1 / 3], np.float32)
    assert with_feedback(extra, values, 0, DType.FLOAT32) is values
    assert extra == {}


def test_a_refused_value_leaves_the_residual() -> None:
    extra: dict[str, np.ndarray] = {}
    with_feedback(extra, np.array([1.0001, 2.0], np.float32), 0, DType.FLOAT16)
    before = extra[RESIDUAL].copy()
    with pytest.raises(PayloadError, match="the first is inf at position 1"):
        with_feedback(extra, np.array([1.0, np.inf], np.float32), 0, DType.FLOAT16)
    np.testing.assert_array_equal(extra[RESIDUAL], before)


@pytest.mark.parametrize("densities", [(0.5, 0.4), (0.2, 0.9), (None, 0.3), (0.3, None)])
def test_the_residual_stays_with_its_weights(densities: tuple[float | None, float | None]) -> None:
    layout = Layout.of(torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3)))
    draw = np.random.default_rng(6)
    old, new = (
        None if d is None else MaskSet.from_positions(layout, np.flatnonzero(draw.random(84) < d)) for d in densities
    )
    kept = [range(84) if mask is None else mask.positions.tolist() for mask in (old, new)]
    numbers = dict(zip(kept[0], draw.standard_normal(len(kept[0])).astype(np.float32), strict=True))
    extra = {RESIDUAL: np.array(list(numbers.values()), np.float32), "other": np.ones(2)}
    move_residual(extra, old, new, layout)
    assert extra[RESIDUAL].tolist() == [numbers.get(position, 0.0) for position in kept[1]]
    assert extra["other"].tolist() == [1, 1]
    empty: dict[str, np.ndarray] = {}
    move_residual(empty, old, new, layout)
    assert empty == {}


# -- whole runs ----------------------------------------------------------------------------------------------


def moved(client: Client) -> None:
    """In place of training: every value takes a small step that depends on client and round alone."""
    floats, _ = client.model_vectors()
    draw = np.random.default_rng([client.id, client.round])
    client.floats = floats + (draw.standard_normal(floats.size) * 2e-4).astype(np.float32)


def restated(run: Run, wire: str, sampled: list[list[int]]) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray]:
    """Both passes in plain numpy over dense vectors: the model, each client's residual, the server's residual."""
    layout = run.layout
    kept = run.arms[0].federation.server.mask
    start, _ = layout.gather(run.pool._create().state_dict())
    weights, rest = start[kept.positions], start[layout.weight_count :]
    zeros = np.zeros_like(weights)
    server_error, client_errors = zeros, dict.fromkeys(range(run.config.clients), zeros)
    model = half(weights, wire)
    server_error = weights - model
    for number, clients in enumerate(sampled, start=1):
        total, total_rest, n = np.zeros(weights.size), np.zeros(rest.size), 0
        for client in clients:
            size = run.partition[client].size
            draw = np.random.default_rng([client, number])
            step = (draw.standard_normal(weights.size + rest.size) * 2e-4).astype(np.float32)
            meant = model + step[: weights.size] + client_errors[client]
            sent = half(meant, wire)
            client_errors[client] = meant - sent
            total += size * sent.astype(np.float64)
            total_rest += size * (rest + step[weights.size :]).astype(np.float64)
            n += size
        meant = (total / n).astype(np.float32) + server_error
        model = half(meant, wire)
        server_error, rest = meant - model, (total_rest / n).astype(np.float32)
    return np.concatenate((model, rest)), client_errors, server_error


@WIRES
@pytest.mark.parametrize("compress", ["none", "deflate"])
def test_a_run_is_the_double_pass(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch, wire: str, compress: str
) -> None:
    monkeypatch.setattr(Method, "train", lambda method, client: moved(client))
    config = tiny(method="magnitude", alpha=0.3, max_images=None, wire=wire, compress=compress, rounds=5)
    run = Run(config, data=images)
    rows = run.finish()
    model, client_errors, server_error = restated(run, wire, [row["sampled"] for row in rows[1:]])
    server = run.arms[0].federation.server
    np.testing.assert_array_equal(server.floats, model)
    np.testing.assert_array_equal(server.extra[RESIDUAL], server_error)
    for client, memory in run.arms[0].clients.memories.items():
        np.testing.assert_array_equal(memory.extra.get(RESIDUAL, np.zeros(1)), client_errors[client])
    assert np.abs(server_error).max() > 0


@pytest.mark.parametrize("method", methods.names())
def test_every_method_keeps_its_residuals_in_step_with_its_masks(images: Dataset, tiny: Make, method: str) -> None:
    changes = {"adjust_every": 1, "rounds": 4, "server_opt": "avgm", "model": "mlp", "width": 0.05}
    run = Run(tiny(method=method, wire="bf16", compress="deflate", sample=4, **changes), data=images)
    assert [row["refused"] for row in run.finish()] == [[]] * 5
    server, layout = run.arms[0].federation.server, run.layout
    memories = run.arms[0].clients.memories.values()
    for extra, mask in ((server.extra, server.mask), *((memory.extra, memory.mask) for memory in memories)):
        if RESIDUAL in extra:
            assert extra[RESIDUAL].size == layout.float_count(mask) - layout.other_count
    split = layout.float_count(server.mask) - layout.other_count
    np.testing.assert_array_equal(server.floats[:split], half(server.floats[:split], "bf16"))


@pytest.mark.parametrize("mode", ["shared", "personal"])
def test_clients_get_the_very_numbers_that_the_server_has(images: Dataset, tiny: Make, mode: str) -> None:
    run = Run(tiny(method="fedpai-u", criterion="snip", mask_mode=mode, wire="bf16", rounds=2), data=images)
    run.finish()
    server = run.arms[0].federation.server
    before = server.floats.copy()
    server.round_to_wire()
    np.testing.assert_array_equal(server.floats, before)
    for client in range(4):
        payload = decode(server.values_message(client))
        np.testing.assert_array_equal(payload.values, server.floats[server.places_of(client)])
        assert (payload.dtype, payload.exact) == (DType.BFLOAT16, run.layout.other_count)


def test_masks_may_change_on_either_side(images: Dataset, tiny: Make) -> None:
    """Remasking, and a mask that arrives, take the client's residual along; `set_mask` the server's."""
    run = Run(tiny(method="magnitude", wire="bf16", rounds=2, sample=4), data=images)
    run.finish()
    server, layout = run.arms[0].federation.server, run.layout
    memory = run.arms[0].clients.memories[0]
    old = server.mask
    dense = np.zeros((2, layout.weight_count), np.float32)
    dense[0, old.positions], dense[1, old.positions] = server.extra[RESIDUAL], memory.extra[RESIDUAL]
    new = MaskSet.from_positions(layout, np.sort(np.append(old.positions[::2], np.setdiff1d(range(60), old.positions))))
    server.set_mask(new)
    np.testing.assert_array_equal(server.extra[RESIDUAL], dense[0, new.positions])
    server.round = 3
    run.arms[0].clients._method.train = lambda client: None
    run.arms[0].clients.turn(0, 3, [*server.mask_message(0), server.values_message(0)])
    assert memory.mask == new
    # What the server sent was representable, so that the answer is the message plus the residual, rounded.
    meant = server.floats[: new.kept] + dense[1, new.positions]
    np.testing.assert_array_equal(memory.extra[RESIDUAL], meant - half(meant, "bf16"))


@pytest.mark.parametrize(("wire", "ratio"), [("fp32", 1.0), ("bf16", 0.5), ("fp16", 0.5)])
def test_bytes_of_the_wire_formats(images: Dataset, tiny: Make, wire: str, ratio: float) -> None:
    run = Run(tiny(method="magnitude", wire=wire, rounds=1), data=images)
    row = run.finish()[1]
    layout, mask = run.layout, run.arms[0].federation.server.mask
    one = 120 + ratio * 4 * mask.kept + 4 * layout.other_count + 8 * layout.int_count
    assert row["bytes_up"] == 3 * one
    deflated = Run(tiny(method="magnitude", wire=wire, rounds=1, compress="deflate"), data=images)
    assert deflated.finish()[1]["bytes_up"] < row["bytes_up"]
    assert deflated.arms[0].federation.server.floats.tobytes() == run.arms[0].federation.server.floats.tobytes()


def test_a_client_that_leaves_the_range_of_fp16_is_refused(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runaway(client: Client) -> None:
        moved(client)
        if client.id == 2:
            client.floats[3] = 7e4

    monkeypatch.setattr(Method, "train", lambda method, client: runaway(client))
    run = Run(tiny(method="magnitude", wire="fp16", rounds=2, sample=4), data=images)
    rows = run.finish()
    for row in rows[1:]:
        assert [refusal["client"] for refusal in row["refused"]] == [2]
        assert "cannot be sent as FLOAT16, whose largest is 65504: the first is 70000.0" in row["refused"][0]["reason"]
    assert RESIDUAL not in run.arms[0].clients.memories[2].extra


def test_a_global_model_beyond_fp16_ends_the_run(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(wire="fp16"), data=images)
    run.arms[0].federation.server.floats[0] = 1e5
    with pytest.raises(MethodError, match=r"--wire fp16 cannot carry the global model: 1 values cannot be sent"):
        run.finish()


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_global_model_that_is_not_finite_ends_the_run(images: Dataset, tiny: Make, wire: str) -> None:
    """No client would take it, so all further rounds would be for nothing; the checkpoint before it stays."""
    run = Run(tiny(method="random", wire=wire, server_opt="avgm", server_lr=1e38, lr=10.0, rounds=9), data=images)
    with pytest.raises(MethodError, match=rf"--wire {wire} cannot carry the global model: \d+ values are not finite"):
        run.finish()
    assert len(run.rows) < 10
    assert all(row["refused"] == [] for row in run.rows)


# -- learning ------------------------------------------------------------------------------------------------


def test_sixteen_bits_learn_as_well_as_thirty_two(images: Dataset, tiny: Make) -> None:
    rows = {}
    for wire in ("fp32", "bf16", "fp16"):
        config = tiny(
            model="mlp", width=1.0, wire=wire, lr=0.02, batch=32, max_images=250, sample=4, rounds=8, local_epochs=2,
            eval_images=200,
        )  # fmt: skip
        rows[wire] = Run(config, data=images).finish()[-1]
    assert rows["fp32"]["accuracy"] > 0.65  # of ten classes
    for wire in HALVES:
        assert rows[wire]["accuracy"] > rows["fp32"]["accuracy"] - 0.06
        assert rows[wire]["train_loss"] < 1.15 * rows["fp32"]["train_loss"]


def test_small_steps_need_the_feedback(images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tiny learning rate most steps are below bf16's last place. How far does a run get on float32's way?"""

    def final(wire: str) -> tuple[np.ndarray, np.ndarray]:
        config = tiny(model="mlp", width=0.1, wire=wire, lr=5e-5, batch=32, max_images=250, sample=4, rounds=10)
        run = Run(config, data=images)
        start = run.arms[0].federation.server.floats.copy()
        run.finish()
        return start, run.arms[0].federation.server.floats

    start, reference = final("fp32")
    way = reference - start

    def progress(wire: str) -> float:
        return float(np.dot(final(wire)[1] - start, way) / np.dot(way, way))

    assert abs(progress("bf16") - 1) < 0.03
    assert abs(progress("fp16") - 1) < 0.003
    for side in ("client", "server"):
        monkeypatch.setattr(
            f"fedpai.federation.{side}.with_feedback", lambda extra, *rest: with_feedback({}, *rest)
        )
    assert progress("bf16") < 0.8
