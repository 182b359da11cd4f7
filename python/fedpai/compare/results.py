# SPDX-License-Identifier: Apache-2.0
"""What the cells of a grid amount to: one row a cell, and one entry for all seeds of a method's settings.

A row has ``row`` ("cell"), ``cell``, ``family``, ``label``, ``seed``, ``model``, ``alpha``, ``config``, ``machine``;
all fields of `fedpai.report.summary.MethodSummary` (accuracies, density, bytes, step and compute times, refused);
``final_density``, that of the last round's masks; ``link``, ``times`` (`fedpai.federation.link_speed.LinkTimes`), and
``curve``: round by round the accuracies and the seconds over the link.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedpai.compare.grid import Cell
from fedpai.federation.link_speed import LinkSpeed, link_times
from fedpai.report.content import MARGIN
from fedpai.report.summary import summarise

Row = dict[str, Any]

DENSE = "fedavg"
"""Whom the tables compare with, and whose accuracy the target is derived from."""


@dataclass(frozen=True)
class Finished:
    """A finished cell, the rows of its rounds and the machine that it ran on."""

    cell: Cell
    rows: list[Row]
    machine: dict[str, Any]


def result_rows(finished: Sequence[Finished], link: LinkSpeed, target: float | None) -> list[Row]:
    """One row a cell.

    Args:
        target: the accuracy that times are counted to; None for one point less than what dense FedAvg ends with, as
            the mean over its seeds on the same network and partition. Where the grid has no FedAvg there is none.
    """
    rows = []
    for one in finished:
        config = one.cell.config
        reach = _target(finished, config.model, config.alpha) if target is None else target
        times = link_times(one.rows, link, reach)
        rows.append(
            {
                "row": "cell",
                "cell": one.cell.name,
                "family": one.cell.family,
                "label": one.cell.label,
                **{key: getattr(config, key) for key in ("seed", "model", "alpha")},
                **summarise(config.method, one.rows).to_json(),
                "final_density": one.rows[-1]["density"],
                "link": link.to_json(),
                "times": times.to_json(),
                "curve": {
                    "accuracy": [row["accuracy"] for row in one.rows],
                    "personal_accuracy": [row["personal_accuracy"] for row in one.rows],
                    "seconds": link.elapsed(one.rows),
                },
                "config": config.to_json(),
                "machine": one.machine,
            }
        )
    return rows


def _target(finished: Sequence[Finished], model: str, alpha: float | None) -> float | None:
    ends = [
        one.rows[-1]["accuracy"]
        for one in finished
        if (one.cell.config.method, one.cell.config.model, one.cell.config.alpha) == (DENSE, model, alpha)
    ]
    return fmean(ends) - MARGIN if ends else None


def to_lines(rows: Sequence[Row]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        mean: of those that there are.
        deviation: their sample standard deviation; None of fewer than two.
        missing: seeds without a value, such as one that never reached the target.
    """

    mean: float
    deviation: float | None
    missing: int = 0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """None where there is no value at all."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, len(values) - len(known))

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"mean": self.mean, "deviation": self.deviation, "missing": self.missing}


@dataclass(frozen=True)
class Entry:
    """A method with its settings on one network and partition, over its seeds; None where nothing was measured.

    Attributes:
        family, label: see `Cell`.
        rows: of its cells.
        accuracy, density: shares, after the last round.
        personal_accuracy: over all clients by the models that they hold in the end; over the last round's clients in
            rows of before that was measured under personal masks.
        accuracy_gap: global accuracy less dense FedAvg's mean, in points.
        uplink, downlink: bytes per client and round.
        sent: bytes of the whole run, both ways, choosing masks included.
        uplink_share, step_speed, sooner: the three ratios of means: bytes up over dense FedAvg's, its time of a step
            over this one's, its time to the target over this one's (None where a seed of either did not reach it).
        step_ms: median of a full-batch training step.
        seconds, target_seconds, personal_target_seconds: over the link, as in `LinkTimes`.
    """

    family: str
    label: str
    rows: list[Row]
    accuracy: Spread | None
    personal_accuracy: Spread | None
    density: Spread | None
    accuracy_gap: float | None
    uplink: Spread | None
    downlink: Spread | None
    sent: Spread | None
    uplink_share: float | None
    step_ms: Spread | None
    step_speed: float | None
    seconds: Spread | None
    target_seconds: Spread | None
    personal_target_seconds: Spread | None
    sooner: float | None

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.rows[0]["method"])

    def to_json(self) -> dict[str, Any]:
        """Plain types, with the cells' names in place of their rows."""
        named = {key: value for key, value in vars(self).items() if key != "rows"}
        plain = {key: value.to_json() if isinstance(value, Spread) else value for key, value in named.items()}
        return {**plain, "cells": [row["cell"] for row in self.rows]}


@dataclass(frozen=True)
class Section:
    """All entries on one network and partition, with the accuracy that their times are counted to."""

    model: str
    alpha: float | None
    target: float | None
    entries: list[Entry]

    @property
    def seeds(self) -> int:
        """The most that an entry has."""
        return max(len(entry.rows) for entry in self.entries)

    @property
    def personal(self) -> bool:
        """Whether any entry has a personalised accuracy."""
        return any(entry.personal_accuracy is not None for entry in self.entries)


def sections(rows: Sequence[Row]) -> list[Section]:
    """Result rows, put together by network, partition and label."""
    places: dict[tuple[str, float | None], dict[str, list[Row]]] = {}
    for row in rows:
        places.setdefault((row["model"], row["alpha"]), {}).setdefault(row["label"], []).append(row)
    found = []
    for (model, alpha), labels in places.items():
        dense = next((_values(same) for same in labels.values() if same[0]["method"] == DENSE), None)
        entries = [_entry(label, same, dense) for label, same in labels.items()]
        target = next(iter(labels.values()))[0]["times"]["target"]
        found.append(Section(model, alpha, target, entries))
    return found


def _values(rows: list[Row]) -> dict[str, Spread | None]:
    direct = ("accuracy", "uplink", "downlink", "step_ms")
    timed = ("seconds", "target_seconds", "personal_target_seconds")
    personal = [
        row["personal_accuracy"] if row["held_accuracy"] is None else row["held_accuracy"] for row in rows
    ]
    sent = [row["total_up"] + row["total_down"] + row["setup_up"] + row["setup_down"] for row in rows]
    return {
        **{key: Spread.of([row[key] for row in rows]) for key in direct},
        **{key: Spread.of([row["times"][key] for row in rows]) for key in timed},
        "personal_accuracy": Spread.of(personal),
        "density": Spread.of([row["final_density"] for row in rows]),
        "sent": Spread.of(sent),
    }


def _entry(label: str, rows: list[Row], dense: dict[str, Spread | None] | None) -> Entry:
    values = _values(rows)
    mine, theirs = _means(values), _means(dense or {})
    return Entry(
        rows[0]["family"],
        label,
        rows,
        accuracy_gap=_gap(mine["accuracy"], theirs.get("accuracy")),
        uplink_share=_over(mine["uplink"], theirs.get("uplink")),
        step_speed=_over(theirs.get("step_ms"), mine["step_ms"]),
        sooner=_over(theirs.get("target_seconds"), mine["target_seconds"]),
        **values,
    )


def _means(values: dict[str, Spread | None]) -> dict[str, float | None]:
    """None where a seed has no value: a mean of those that did reach a target flatters."""
    return {key: None if spread is None or spread.missing else spread.mean for key, spread in values.items()}


def _gap(accuracy: float | None, dense: float | None) -> float | None:
    return None if accuracy is None or dense is None else 100 * (accuracy - dense)


def _over(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def entry_rows(found: Sequence[Section]) -> list[Row]:
    """The entries of all sections as JSON rows."""
    return [
        {"row": "entry", "model": section.model, "alpha": section.alpha, "target": section.target, **entry.to_json()}
        for section in found
        for entry in section.entries
    ]
