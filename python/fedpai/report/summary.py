# SPDX-License-Identifier: Apache-2.0
"""What a run amounts to: per-method totals and the ratios between a method and its baseline.

Three speeds, never merged: compute per local training step, bytes on the wire, and (`federation/link_speed.py`) time
to an accuracy over a stated link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, quantiles
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class MethodSummary:
    """Totals of one method.

    Attributes:
        rounds: finished ones.
        accuracy, best_accuracy: global model after the last round, and its best round (chosen on test data); None
            for a method without one, as global_density.
        personal_accuracy: own models of the last round's clients on their own class mix; else None.
        held_accuracy: the same of all clients, by the models that they hold after the last round; else None.
        density: share of the conv and linear weights that a client trains.
        global_density: share that the server's model holds (more than `density` under personal masks).
        uplink, downlink: bytes per client and round of training.
        total_up, total_down: bytes of all rounds of training.
        setup_up, setup_down: bytes of round 0, where masks are chosen.
        step_ms, step_ms_low, step_ms_high: median and 20/80 % quantiles of a full-batch training step; None
            before any.
        steps, images: training steps and images seen.
        compute_seconds: sum of all training steps on all clients.
        mask_seconds: round 0, clients' and server's work for choosing masks.
        refused: messages that were not accepted.
    """

    method: str
    rounds: int
    accuracy: float | None
    best_accuracy: float | None
    personal_accuracy: float | None
    held_accuracy: float | None
    density: float
    global_density: float | None
    uplink: float
    downlink: float
    total_up: int
    total_down: int
    setup_up: int
    setup_down: int
    step_ms: float | None
    step_ms_low: float | None
    step_ms_high: float | None
    steps: int
    images: int
    compute_seconds: float
    mask_seconds: float
    refused: int

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True)
class Ratios:
    """A method against its baseline, each by its own definition; None where nothing was measured.

    Attributes:
        compute_per_step: baseline's median time of a full-batch step / the method's: above 1 is faster.
        compute_total: the same for the sum of all training steps.
        uplink, downlink: the method's bytes / the baseline's over the rounds of training: below 1 is less.
        uplink_with_setup, downlink_with_setup: the same with round 0 counted in.
        accuracy_gap: method's final accuracy minus the baseline's, in points; None without a global model.
    """

    compute_per_step: float | None
    compute_total: float | None
    uplink: float | None
    downlink: float | None
    uplink_with_setup: float | None
    downlink_with_setup: float | None
    accuracy_gap: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def summarise(method: str, rows: Sequence[Row]) -> MethodSummary:
    """Totals of one method from its rows (round 0 first)."""
    mine = [row for row in rows if row["method"] == method]
    setup, trained = mine[0], mine[1:]
    last = mine[-1]
    steps = [ms for row in trained for ms in row["time"]["step_ms"]]
    low, high = (None, None)
    if len(steps) > 1:
        fifths = quantiles(steps, n=5, method="inclusive")
        low, high = fifths[0], fifths[3]
    turns = max(1, sum(len(row["sampled"]) for row in trained))
    return MethodSummary(
        method=method,
        rounds=last["round"],
        accuracy=last["accuracy"],
        best_accuracy=max((row["accuracy"] for row in mine if row["accuracy"] is not None), default=None),
        personal_accuracy=last["personal_accuracy"],
        held_accuracy=last.get("held_accuracy"),
        density=fmean(row["density"] for row in trained or mine),
        global_density=last["global_density"],
        uplink=sum(row["bytes_up"] for row in trained) / turns,
        downlink=sum(row["bytes_down"] for row in trained) / turns,
        total_up=sum(row["bytes_up"] for row in trained),
        total_down=sum(row["bytes_down"] for row in trained),
        setup_up=setup["bytes_up"],
        setup_down=setup["bytes_down"],
        step_ms=median(steps) if steps else None,
        step_ms_low=low,
        step_ms_high=high,
        steps=sum(row["steps"] for row in trained),
        images=sum(row["images"] for row in trained),
        compute_seconds=sum(row["time"]["compute"] for row in trained),
        mask_seconds=setup["time"]["masks"],
        refused=sum(len(row["refused"]) for row in mine),
    )


def compare(method: MethodSummary, baseline: MethodSummary) -> Ratios:
    """Ratios of a method to its baseline."""
    return Ratios(
        compute_per_step=_over(baseline.step_ms, method.step_ms),
        compute_total=_over(baseline.compute_seconds, method.compute_seconds),
        uplink=_over(method.total_up, baseline.total_up),
        downlink=_over(method.total_down, baseline.total_down),
        uplink_with_setup=_over(method.total_up + method.setup_up, baseline.total_up + baseline.setup_up),
        downlink_with_setup=_over(
            method.total_down + method.setup_down, baseline.total_down + baseline.setup_down
        ),
        accuracy_gap=None
        if method.accuracy is None or baseline.accuracy is None
        else 100 * (method.accuracy - baseline.accuracy),
    )


def _over(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None
