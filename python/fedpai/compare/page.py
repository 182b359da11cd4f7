# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: a table and four plots for each network and partition, in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpai.bench.table import Table
from fedpai.compare import tables
from fedpai.compare.results import Entry, Row, Section, Spread
from fedpai.federation.files import write_atomic
from fedpai.report.charts import Series, line_chart
from fedpai.report.page import flat, render

TEMPLATE = "compare.html.j2"
STYLES = tuple(f"s{number}" for number in range(12))


@dataclass(frozen=True)
class Part:
    """A section as the page shows it: its table, its plots, and the colour of each method in them."""

    title: str
    anchor: str
    table: Table
    target: float | None
    personal: bool
    legend: list[tuple[str, str]]
    charts: dict[str, str]


def write(file: Path, found: Sequence[Section], rows: Sequence[Row], settings: dict[str, Any], left: int) -> None:
    """Renders the page and replaces the file.

    Args:
        found: what `results.sections` made of the rows, at least one.
        rows: the result rows.
        settings: that all cells share.
        left: cells that are not finished yet.
    """
    page = render(
        TEMPLATE,
        parts=[part(section) for section in found],
        link=rows[0]["link"],
        rows=rows,
        settings=settings,
        left=left,
        machines=list({str(row["machine"]): flat(row["machine"]) for row in rows}.values()),
    )
    write_atomic(file, page.encode())


def part(section: Section) -> Part:
    """A section's table and plots."""
    families = list(dict.fromkeys(entry.family for entry in section.entries))
    styles = {family: STYLES[number % len(STYLES)] for number, family in enumerate(families)}
    charts = {
        "kept": _points(section, styles, lambda e: _scaled(e.density, 100), "weights kept, %"),
        "step": _points(section, styles, lambda e: _scaled(e.step_ms, 1), "ms of compute per training step"),
        "bytes": _points(section, styles, lambda e: _scaled(e.sent, 1e-6), "MB sent in all, both ways"),
        "seconds": _curves(section, styles),
    }
    return Part(
        tables.title(section),
        tables.anchor(section),
        tables.table(section),
        section.target,
        section.personal,
        list(styles.items()),
        charts,
    )


def _scaled(spread: Spread | None, factor: float) -> float | None:
    return None if spread is None else factor * spread.mean


def _points(
    section: Section, styles: dict[str, str], x: Callable[[Entry], float | None], x_label: str
) -> str:
    """Final accuracy over a cost, with its deviation; a line for each family, dashed if personalised."""
    series = []
    for family, style in styles.items():
        for personal in (False, True):
            points = []
            for entry in section.entries:
                accuracy = entry.personal_accuracy if personal else entry.accuracy
                at = x(entry)
                if entry.family == family and accuracy is not None and at is not None:
                    points.append((at, 100 * accuracy.mean, 100 * (accuracy.deviation or 0.0)))
            points.sort()
            label = f"{family}, personalised" if personal else family
            series.append(
                Series(label, [p[:2] for p in points], style, personal, [p[2] for p in points])
            )
    return line_chart(series, x_label=x_label, y_label="final test accuracy, %", log_x=True, from_zero=False)


def _curves(section: Section, styles: dict[str, str]) -> str:
    """Accuracy over seconds on the link, both as means over the seeds of each round of training."""
    series = []
    for entry in section.entries:
        curves = [row["curve"] for row in entry.rows]
        seconds = [fmean(ends) for ends in zip(*(curve["seconds"] for curve in curves), strict=True)]
        for key, dashed in (("accuracy", False), ("personal_accuracy", True)):
            rounds = list(zip(seconds, zip(*(curve[key] for curve in curves), strict=True), strict=True))[1:]
            points = [(at, 100 * fmean(values)) for at, values in rounds if None not in values]
            label = f"{entry.label}, personalised" if dashed else entry.label
            series.append(Series(label, points, styles[entry.family], dashed))
    return line_chart(series, x_label="seconds over the link", y_label="test accuracy, %", log_x=True)
