# SPDX-License-Identifier: Apache-2.0
"""The report: right numbers, nothing from outside the file, charts that are well-formed."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpai import report
from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.link_speed import LinkSpeed, link_times
from fedpai.federation.progress import summary_line
from fedpai.federation.runner import Run
from fedpai.report.charts import Bar, Series, bar_chart, line_chart, log_ticks, number, ticks
from fedpai.report.page import size
from fedpai.report.profile import profile_layers
from fedpai.report.summary import compare, summarise


def row(method: str, round: int, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": method,
        "round": round,
        "accuracy": 0.5,
        "personal_accuracy": None,
        "sampled": [0, 1],
        "refused": [],
        "images": 64,
        "steps": 2,
        "bytes_up": 100,
        "bytes_down": 120,
        "density": 1.0,
        "global_density": 1.0,
        "time": {"compute": 0.2, "step_ms": [90.0, 110.0], "evaluate": 0.1, "round": 0.5, "masks": 0.3},
    }
    return {**base, **changes}


ROWS = [
    row("ours", 0, bytes_up=1000, images=0, steps=0, time={"compute": 0.0, "step_ms": [], "masks": 2.5}),
    row("ours", 1, bytes_up=2, density=0.02, accuracy=0.7, time={"compute": 0.04, "step_ms": [19.0, 21.0]}),
    row("ours", 2, bytes_up=2, density=0.02, accuracy=0.6, time={"compute": 0.04, "step_ms": [20.0, 20.0]}),
    row("base", 0, bytes_up=0, bytes_down=0, time={"compute": 0.0, "step_ms": [], "masks": 0.0}),
    row("base", 1),
    row("base", 2, accuracy=0.65, refused=[{"client": 1, "reason": "late"}]),
]


def test_totals_and_ratios() -> None:
    ours, base = summarise("ours", ROWS), summarise("base", ROWS)
    assert (ours.accuracy, ours.best_accuracy, ours.rounds) == (0.6, 0.7, 2)
    assert (ours.total_up, ours.setup_up, ours.uplink) == (4, 1000, 1.0)
    assert (ours.step_ms, base.step_ms) == (20.0, 100.0)
    assert ours.mask_seconds == 2.5
    assert ours.density == pytest.approx(0.02)
    assert (base.refused, ours.refused) == (1, 0)
    ratios = compare(ours, base)
    assert ratios.compute_per_step == pytest.approx(5.0)
    assert ratios.compute_total == pytest.approx(5.0)
    assert ratios.uplink == pytest.approx(0.02)
    assert ratios.uplink_with_setup == pytest.approx(1004 / 200)
    assert ratios.accuracy_gap == pytest.approx(-5.0)


def test_no_full_batch_means_no_step_time() -> None:
    rows = [row("ours", 0), row("ours", 1, time={"compute": 0.1, "step_ms": []})]
    summary = summarise("ours", [{**rows[0], "time": {"step_ms": [], "masks": 0, "compute": 0}}, rows[1]])
    assert summary.step_ms is None
    assert compare(summary, summary).compute_per_step is None


@pytest.fixture
def finished(images: Dataset, tiny: Callable[..., RunConfig]) -> Run:
    run = Run(tiny(method="fedpai-u", baseline="fedavg", rounds=2), data=images)
    run.finish()
    return run


def test_page_is_one_file_with_everything(finished: Run, tmp_path: Path) -> None:
    layers = report.layer_profile(finished, tmp_path / "profile.json")
    content = report.collect(finished, layers)
    text = report.write(content, tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[a-z]|<script|<link|url\(|@import|<img", text) == []
    for method in content.methods:
        assert f"{100 * method.accuracy:.2f} %" in text
    for layer in layers:
        assert layer["name"] in text
        assert layer["kernel"] in text
        assert f'<td class="left">{layer["structure"]}</td>' in text
    machine = content.machine
    for fact in (machine["machine"]["cpu"], machine["software"]["torch"], machine["isa"], machine["commit"]):
        assert fact is None or f"<dd>{fact}</dd>" in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 5
    for svg in svgs:
        assert not re.search(r"nan|inf", re.sub(r"<(text|title).*?</\1>", "", svg))
        ElementTree.fromstring(svg)


def test_times_over_a_link_are_a_third_speed(finished: Run, tmp_path: Path) -> None:
    link = LinkSpeed(1e3, 1e4, 2.0)
    content = report.collect(finished, None, link)
    target = (content.methods[1].accuracy or 0.0) - 0.01
    of_method = {m.method: [row for row in finished.rows if row["method"] == m.method] for m in content.methods}
    assert content.times == [link_times(rows, link, target) for rows in of_method.values()]
    page = report.write(content, tmp_path / "r.html").read_text(encoding="utf-8")
    for words in ("Times over the link", "1 KB/s up, 10 KB/s down, devices 2 x slower"):
        assert words in page
    assert f"Target: {100 * target:.2f} %" in page
    assert len(re.findall("<svg", page)) == len(report.page.charts(content)) - 1, "no chart of layers without times"
    printed = report.text(content)
    assert f"fedavg             {content.times[1].seconds:.1f} s in all; {100 * target:.2f} % " in printed
    assert [row["row"] for row in report.json_rows(content)][-3:] == ["time", "time", "ratios"]
    assert report.collect(finished, None, link, 0.5).times[0].target == 0.5
    untimed = report.write(report.collect(finished), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "over the link" not in untimed


def test_times_without_a_global_model(finished: Run, tmp_path: Path) -> None:
    for row in finished.rows:
        if row["method"] == "fedpai-u":
            row.update(accuracy=None, personal_accuracy=0.75 if row["round"] else None)
    content = report.collect(finished, None, LinkSpeed(1e6, 1e7), 0.7)
    assert content.ratios is not None
    assert content.ratios.accuracy_gap is None
    assert (content.times[0].target_seconds, content.times[0].personal_target_round) == (None, 1)
    assert "70.00 % not reached; 70.00 % personalised after" in report.text(content)
    page = report.write(content, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "75.00 %" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"nan|inf", re.sub(r"<(text|title).*?</\1>", "", svg))
    assert "accuracy" not in summary_line(finished.rows[0])


def test_profile_is_kept_and_not_measured_again(finished: Run, tmp_path: Path) -> None:
    first = report.layer_profile(finished, tmp_path / "profile.json")
    assert report.layer_profile(finished, tmp_path / "profile.json") == first
    assert {"name", "density", "structure", "kernel", "reason", "dense_ms", "sparse_ms"} <= first[0].keys()


def test_dense_run_has_no_layer_table(
    images: Dataset, tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = Run(tiny(rounds=1), data=images)
    run.finish()
    layers = report.layer_profile(run, tmp_path / "profile.json")
    assert layers == []
    text = report.write(report.collect(run, layers), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Time per layer" not in text
    assert "not measured" not in text


def test_personal_column_only_where_it_has_a_meaning(
    images: Dataset, tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = Run(tiny(method="fedpai-u", mask_mode="personal", rounds=1), data=images)
    run.finish()
    content = report.collect(run)
    text = report.write(content, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Personalised accuracy" in text
    assert f"{100 * (content.methods[0].personal_accuracy or 0):.2f} %" in report.text(content)


def test_a_method_without_a_global_model(
    images: Dataset, tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its global accuracy is nowhere a number; everything else is as ever."""
    run = Run(tiny(method="spafl", baseline="fedavg", rounds=2), data=images)
    run.finish()
    content = report.collect(run)
    ours, base = content.methods
    assert content.ratios is not None
    assert (ours.accuracy, ours.best_accuracy, ours.global_density, content.ratios.accuracy_gap) == (None,) * 4
    assert base.accuracy is not None
    assert ours.held_accuracy is not None
    plain = report.text(content)
    row, other = (re.split(r" {2,}", line) for line in plain.splitlines()[1:3])
    assert row[:3] == ["spafl", "-", f"{100 * (ours.personal_accuracy or 0):.2f} %"]
    assert other[2].startswith("- ")
    assert f"spafl: {100 * ours.held_accuracy:.2f} % over all clients" in plain
    assert "points" not in plain
    page = report.write(content, tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"{100 * ours.held_accuracy:.2f} % over all clients" in page
    assert "<td>spafl</td><td>–</td><td>–</td>" in page
    assert "points" not in re.sub(r"(?s)<svg.*?</svg>|points=", "", page)
    rows = report.json_rows(content)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_json_rows_are_json(finished: Run) -> None:
    rows = report.json_rows(report.collect(finished))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    kinds = [row["row"] for row in rows]
    assert kinds == ["run", *["round"] * 6, *["layer"] * 7, "method", "method", "ratios"]


def test_profile_times_every_layer_and_leaves_hooks_behind_nowhere(finished: Run) -> None:
    dense, sparse = finished.pool.get(None), finished.pool.get(finished.arms[0].federation.server.mask)
    x, _ = finished.data.batch(torch.arange(8))
    times = profile_layers(dense.model, sparse.model, x, repeats=1)
    assert [time.name + ".weight" for time in times] == [slot.key for slot in finished.layout.weights]
    assert times[0].input == (8, 1, 32, 32)
    assert all(not module._forward_pre_hooks for module in dense.model.modules())


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (3, 3), (-5, 7), (0.1, 0.97), (0, 1e-6), (12, 1e9), (0, 6), (99.9, 100.0)],
)
def test_ticks_cover_the_range_in_round_steps(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-9 * abs(low)
    assert marks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(marks) <= 9
    steps = {f"{b - a:.6g}" for a, b in pairwise(marks)}
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (1.5, 40, [1, 2, 5, 10, 20, 50]),
        (2, 100, [2, 5, 10, 20, 50, 100]),
        (3, 3, [2, 5]),
        (5, 5, [5, 10]),
        (0.002, 900, [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
    ],
)
def test_log_ticks(low: float, high: float, marks: list[float]) -> None:
    assert log_ticks(low, high) == marks


def test_a_log_axis_has_equal_ratios_at_equal_distances() -> None:
    series = [Series("a", [(0, 5), (1, 80), (10, 85), (100, 90)], "s2", False, [0, 0, 2, 0])]
    drawn = ElementTree.fromstring(line_chart(series, x_label="x", y_label="y", log_x=True, from_zero=False))
    dots = [float(dot.attrib["cx"]) for dot in drawn.findall("circle")]
    assert len(dots) == 3, "there is no zero on a log axis"
    assert dots[1] - dots[0] == pytest.approx(dots[2] - dots[1], abs=0.2)
    (bar,) = [line for line in drawn.findall("line") if "s2" in line.attrib["class"]]
    (dot,) = [dot for dot in drawn.findall("circle") if dot.findtext("title") == "a: 10, 85 ± 2"]
    middle = (float(bar.attrib["y1"]) + float(bar.attrib["y2"])) / 2
    assert (bar.attrib["x1"], middle) == (dot.attrib["cx"], pytest.approx(float(dot.attrib["cy"]), abs=0.1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2, "2"),
        (0.5, "0.5"),
        (98.04, "98"),
        (3.217, "3.22"),
        (1234.5, "1,234"),
        (0.00123, "0.00123"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.54 kB"), (44.7e6, "44.7 MB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_charts_survive_odd_input() -> None:
    assert "nothing measured" in line_chart([], x_label="x", y_label="y")
    assert "nothing measured" in line_chart([Series("a", [(1, math.nan)], "s0")], x_label="x", y_label="y")
    assert "nothing measured" in bar_chart([Bar("a", [None])], [("s", "s0")], unit="ms")
    single = line_chart([Series("<&>", [(0, 5)], "s0")], x_label="<x>", y_label="&")
    ElementTree.fromstring(single)
    partial = bar_chart(
        [Bar("a", [1.0, None]), Bar("b", [math.nan, 2.0])], [("s", "s0"), ("d", "s1")], unit="ms"
    )
    assert ElementTree.fromstring(partial).findall("rect").__len__() == 2
