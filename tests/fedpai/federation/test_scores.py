# SPDX-License-Identifier: Apache-2.0
"""Coarse scores: how far they are from the exact ones, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.payload import DType, PayloadError, decode
from fedpai.federation.runner import Run
from fedpai.federation.scores import LEVELS, coarse, restored
from tests.fedpai.federation.test_bad_clients import reencoded, tampered

Make = Callable[..., RunConfig]


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 300),
    kept=st.integers(0, 400),
    scale=st.integers(-20, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_score_moves_by_half_a_step_at_most(count: int, kept: int, scale: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    scores = (noise.standard_normal(count) ** 3 * 10.0**scale).astype(np.float32)
    message = coarse(scores, kept)
    assert message.dtype == np.float32
    assert message.shape == (count + 1,)
    step = float(message[-1])
    tau = float(np.sort(np.abs(scores))[::-1][min(max(kept, 1), count) - 1])
    assert step == np.float32(tau / LEVELS)
    np.testing.assert_array_equal(message[:-1], np.rint(message[:-1]))
    meant = np.clip(scores.astype(np.float64), -32767 * step, 32767 * step)
    assert (
        np.abs(restored(message) - meant) <= step * (0.5 + 2.0**-8)
    ).all()  # 2^-8: rounded to float32 twice


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(5),
        np.array([0, 0, 0, 3e-3, -1]),
        np.array([1e-44, 1e-44, -1e-44]),
        np.array([3e38, -3e38, 2e38, 1e38]),
    ],
    ids=["zeros", "fewer_than_kept", "denormal", "huge"],
)
def test_odd_scores_survive(scores: np.ndarray) -> None:
    scores = scores.astype(np.float32)
    found = restored(coarse(scores, 4))
    largest = np.abs(scores).max()
    assert np.isfinite(found).all()
    assert (np.abs(found - scores) <= max(largest / 2 / LEVELS, 1e-45)).all()


@pytest.mark.filterwarnings("error")
def test_scores_far_above_tau_are_clipped() -> None:
    """tau is the third largest, so small that the quotient has no float32; nobody is warned of that."""
    message = coarse(np.array([1e30, -1e-40, 0, -1e30], np.float32), 3)
    assert message[:-1].tolist() == [32767, -4, 0, -32767]
    assert message[-1] == np.float32(1e-40) / np.float32(4)


@pytest.mark.parametrize("step", [0.0, -1.0, 1e38])
def test_a_step_that_cannot_be_is_refused(step: float) -> None:
    message = np.array([0, 100, step], np.float32)
    with pytest.raises(PayloadError, match="scores have a step of"):
        restored(message)


def test_ssfl_takes_them_too(images: Dataset, tiny: Make) -> None:
    exact, short = (
        Run(tiny(method="ssfl", scores=form, rounds=1), data=images).finish()[0]
        for form in ("exact", "coarse")
    )
    assert short["bytes_up"] < exact["bytes_up"] / 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: reencoded(m, values=np.append(decode(m).values[:-1], np.float32(-1))),
            "have a step of -1.0",
        ),
        (lambda m: reencoded(m, values=np.append(decode(m).values[:-1], np.float32(np.nan))), "not finite"),
        (lambda m: reencoded(m, values=decode(m).values[1:]), "number of values"),
        (
            lambda m: reencoded(m, exact=0, values=np.zeros(decode(m).count, np.float32)),
            "number of float32 values",
        ),
        (lambda m: reencoded(m, dtype=DType.FLOAT32, exact=0), "dtype is 'FLOAT32', expected 'INT16'"),
    ],
    ids=["step", "nan_step", "short", "no_step", "exact"],
)
def test_bad_scores_are_refused(
    images: Dataset, tiny: Make, change: Callable[[bytes], bytes], reason: str
) -> None:
    config = tiny(method="fedpai-u", criterion="snip", scores="coarse", clients=3, sample=3, rounds=1)
    _, rows = tampered(config, images, {1: change}, round=0)
    assert [refusal["client"] for refusal in rows[0]["refused"]] == [1]
    assert reason in rows[0]["refused"][0]["reason"]
    assert rows[1]["refused"] == []


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--scores 'rough'.*exact, coarse|--scores.*rough.*exact.*coarse"):
        RunConfig(scores="rough")
