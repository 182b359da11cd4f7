# SPDX-License-Identifier: Apache-2.0
"""From timings to figures, and a measurement of layers so small that it takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fedpai_kernels as fk
from fedpai_kernels import tuning
from fedpai_kernels.tuning import TuningError, measure


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({0.2: 4.0, 0.5: 2.0, 1.0: 1.0}, 1.0),
        ({0.2: 4.0, 0.5: 2.0, 1.0: 0.5}, 0.75),  # half-way between log 2 and -log 2
        ({0.2: 4.0, 0.5: 0.5, 1.0: 0.25}, 0.4),  # log 4 to -log 2: two thirds of the way
        ({0.2: 0.9, 0.5: 0.5}, 0.0),
        ({0.2: 0.9, 0.5: 1.0, 1.0: 0.5}, 0.5),  # noise below decides nothing
        ({1.0: 1.5, 0.5: 0.9}, 1.0),
    ],
)
def test_crossing(ratios: dict[float, float], expected: float) -> None:
    assert measure.crossing(ratios) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({27: 3.0, 288: 1.5, 1152: 0.8}, 576),
        ({27: 3.0, 288: 1.5}, 288),
        ({27: 0.9, 288: 0.5}, 0),
        ({27: 3.0, 144: 0.99, 288: 1.5, 1152: 0.5}, 576),  # one that loses little does not bar the next
    ],
)
def test_threshold(ratios: dict[int, float], expected: int) -> None:
    assert measure.threshold(ratios) == expected


def test_turns_are_taken() -> None:
    calls: list[str] = []
    medians = measure.interleaved_medians(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1e-9
    )
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 1 + measure.LEAST_ROUNDS
    assert all(sorted(turn) == ["a", "b"] for turn in rounds)
    assert min(medians.values()) > 0


def test_both_contenders_compute_the_same() -> None:
    for module, x in (
        (nn.Conv2d(4, 6, 3, 2, 1, bias=False), torch.randn(5, 4, 7, 7)),
        (nn.Linear(8, 3), torch.randn(5, 8)),
    ):
        mask = torch.rand_like(module.weight) < 0.5
        seen = {}
        for name, step in measure.steps_of(
            module, mask, x.requires_grad_(), torch.ones_like(module(x))
        ).items():
            (layer,) = (
                c.cell_contents for c in step.__closure__ or () if isinstance(c.cell_contents, nn.Module)
            )
            step()
            seen[name] = layer
        torch.testing.assert_close(seen["sparse"].values.grad, seen["dense"].values.grad)
        assert type(seen["sparse"]).__name__.startswith("Sparse")
        assert type(seen["dense"]).__name__.startswith("Masked")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Layers that take no time, and a cache folder of its own."""
    conv, strided, pointwise = (
        measure._Conv(2, 4, 4, 4),
        measure._Conv(2, 4, 4, 4, 3, 2),
        measure._Conv(2, 4, 4, 4, 1),
    )
    linear = measure._Linear(2, 8, 4)
    cases = {"conv2d": conv, "strided": strided, "pointwise": pointwise, "linear": linear}
    cases |= {"blocks": conv, "linear_blocks": linear}
    monkeypatch.setattr(measure, "_MASKED", {name: ((case,), (0.5, 1.0)) for name, case in cases.items()})
    monkeypatch.setattr(measure, "_FULL", (conv,))
    monkeypatch.delenv("FEDPAI_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_measurement_is_kept_and_used(small: Path) -> None:
    state, shares = torch.get_rng_state(), []
    figures = fk.tune(seconds=0.1, progress=lambda share, text: shares.append(share))
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers stay what they are"
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    path = tuning.default_path()
    content = json.loads(path.read_text())
    assert content["machine"] == tuning.facts()
    assert len(content["samples"]) == 7
    kept = tuning.break_evens()
    assert kept.source == figures.source == "measured on this machine"
    assert kept.densities() == pytest.approx(figures.densities(), abs=1e-4)
    assert kept.full_fan_in == figures.full_fan_in


def test_where_it_is_written(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fk.tune(small / "given.json", seconds=0.01)
    assert tuning.break_evens() is tuning.BUILT_IN
    monkeypatch.setenv("FEDPAI_TUNING", str(small / "named.json"))
    fk.tune(seconds=0.01)
    assert tuning.state().path == small / "named.json"
    assert tuning.state().kind == "measured"


def test_mistakes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^seconds: expected more than 0, got 0"):
        fk.tune(seconds=0)
    monkeypatch.setenv("FEDPAI_TUNING", "off")
    with pytest.raises(TuningError, match="FEDPAI_TUNING is 'off', so nothing would read the figures"):
        fk.tune()
    (small / "file").touch()
    with pytest.raises(OSError, match="file"):
        fk.tune(small / "file" / "tuning.json", seconds=0.01)
