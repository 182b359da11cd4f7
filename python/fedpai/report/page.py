# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that needs nothing else: template, style and charts are inside it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from fedpai.federation.files import write_atomic
from fedpai.report.charts import Bar, Series, bar_chart, line_chart, number
from fedpai.report.content import Content, Row

STYLES = ("s0", "s1")
TEMPLATE = "report.html.j2"
STEP_POINTS = 150


def write(content: Content, file: Path) -> Path:
    """Renders the page and replaces the file."""
    page = render(
        TEMPLATE,
        content=content,
        charts=charts(content),
        machine=flat(content.machine),
        legend=[(m.method, STYLES[i]) for i, m in enumerate(content.methods)],
        personal=any(m.personal_accuracy is not None for m in content.methods),
    )
    write_atomic(file, page.encode())
    return file


def render(template: str, **values: Any) -> str:
    """One of the package's templates, filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedpai.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(number=number, size=size)
    return environment.get_template(template).render(**values)


def flat(machine: dict[str, Any]) -> dict[str, str]:
    """Nested facts as one list for the page; unknown ones are left out."""
    facts: dict[str, str] = {}
    for key, value in machine.items():
        if key == "caches":
            facts[key] = ", ".join(f"{level} {size}" for level, size in value.items())
        elif isinstance(value, dict):
            facts.update(flat(value))
        elif value is not None:
            facts[key.replace("_", " ")] = str(value)
    return facts


def charts(content: Content) -> dict[str, str]:
    """All charts by name, as SVG text."""
    by_method = [
        (m.method, STYLES[i], [row for row in content.rows if row["method"] == m.method])
        for i, m in enumerate(content.methods)
    ]

    def accuracy(x: Callable[[list[Row]], list[float]], x_label: str) -> str:
        """Accuracy over anything that grows by the round: of the global model, and dashed the personalised one."""
        series = []
        for name, style, rows in by_method:
            for label, key, dashed in ((name, "accuracy", False), (f"{name}, personalised", "personal_accuracy", True)):
                points = [
                    (at, 100 * row[key]) for at, row in zip(x(rows), rows, strict=True) if row[key] is not None
                ]
                series.append(Series(label, points, style, dashed))
        return line_chart(series, x_label=x_label, y_label="test accuracy, %")

    return {
        "rounds": accuracy(_rounds, "round"),
        "seconds": accuracy(_seconds, "seconds of client compute"),
        "link": "" if content.link is None else accuracy(content.link.elapsed, "seconds over the link"),
        "bytes": _bytes_chart(by_method),
        "steps": line_chart(
            [Series(name, _steps(rows), style) for name, style, rows in by_method],
            x_label="full-batch training step",
            y_label="ms",
        ),
        "layers": _layer_chart(content),
    }


def _rounds(rows: list[Row]) -> list[float]:
    return [float(row["round"]) for row in rows]


def _seconds(rows: list[Row]) -> list[float]:
    return list(accumulate(row["time"]["compute"] for row in rows))


def _steps(rows: list[Row]) -> list[tuple[float, float]]:
    """Step times in the order they ran, thinned by medians to what a chart can show."""
    times = [ms for row in rows for ms in row["time"]["step_ms"]]
    group = -(-len(times) // STEP_POINTS) if times else 1
    return [(at + (group + 1) / 2, median(times[at : at + group])) for at in range(0, len(times), group)]


def _bytes_chart(by_method: list[tuple[str, str, list[Row]]]) -> str:
    """Cumulative megabytes, up solid and down dashed."""
    series = []
    for name, style, rows in by_method:
        for key, word, dashed in (("bytes_up", "up", False), ("bytes_down", "down", True)):
            total = accumulate(row[key] / 1e6 for row in rows)
            series.append(
                Series(f"{name}, {word}", list(zip(_rounds(rows), total, strict=True)), style, dashed)
            )
    return line_chart(series, x_label="round", y_label="MB sent so far, all clients")


def _layer_chart(content: Content) -> str:
    bars = [
        Bar(layer["name"], [layer["sparse_ms"], layer["dense_ms"]])
        for layer in content.layers
        if "dense_ms" in layer
    ]
    return bar_chart(bars, [("sparse", "s0"), ("dense", "s1")], unit="ms, forward + backward")


def size(count: float) -> str:
    """Bytes for human eyes, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} GB"
