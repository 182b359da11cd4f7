# SPDX-License-Identifier: Apache-2.0
"""From rows of rounds to tables: targets, means and spreads against values by hand; the page shows all of it."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from fedpai.compare import page, tables
from fedpai.compare.grid import expand
from fedpai.compare.progress import GridProgress
from fedpai.compare.results import Finished, Section, Spread, entry_rows, result_rows, sections
from fedpai.federation.link_speed import LinkSpeed

LINK = LinkSpeed(uplink=100.0, downlink=1000.0)
MACHINE = {"machine": {"cpu": "a CPU", "cores": 2}, "commit": "abc", "threads": 2}


def rows(
    method: str,
    accuracies: list[float | None],
    personal: list[float | None] | None = None,
    bytes_up: int = 100,
    step: float = 100.0,
) -> list[dict[str, Any]]:
    """Rounds of one method: each as long as 1 s of compute, bytes_up / 100 of sending and 1 s of receiving."""
    found = []
    for number, accuracy in enumerate(accuracies):
        trained = number > 0
        found.append(
            {
                "method": method,
                "round": number,
                "accuracy": accuracy,
                "personal_accuracy": None if personal is None else personal[number],
                "sampled": [0] if trained else [],
                "refused": [],
                "images": 10,
                "steps": 2,
                "bytes_up": bytes_up if trained else 0,
                "bytes_down": 1000 if trained else 0,
                "clients": [{"client": 0, "bytes_up": bytes_up, "bytes_down": 1000}] if trained else [],
                "density": 1.0 if method == "fedavg" else 0.02,
                "global_density": 1.0,
                "time": {
                    "compute": 1.0,
                    "clients": [1.0] if trained else [],
                    "step_ms": [step] if trained else [],
                    "masks": 0.0,
                    "merge": 0.0,
                },
            }
        )
    return found


@pytest.fixture
def found() -> list[Section]:
    """FedAvg and FedPaI-U over two seeds; the second FedPaI-U never reaches the target."""
    cells = {
        cell.name: cell
        for cell in expand({"method": ["fedavg", "fedpai-u"], "mask_mode": ["personal"], "seed": [0, 1]}, {})
    }
    measured = {
        "resnet18-fedavg-iid-seed0": rows("fedavg", [0.1, 0.5, 0.80]),
        "resnet18-fedavg-iid-seed1": rows("fedavg", [0.1, 0.82, 0.84]),
        "resnet18-fedpai-u-0.98-grasp-personal-iid-seed0": rows("fedpai-u", [0.1, 0.81, 0.83], [None, 0.9, 0.6], 2, 10),
        "resnet18-fedpai-u-0.98-grasp-personal-iid-seed1": rows("fedpai-u", [0.1, 0.7, 0.79], [None, 0.7, 0.8], 2, 15),
    }
    finished = [Finished(cells[name], measured[name], MACHINE) for name in measured]
    return sections(result_rows(finished, LINK, None))


def test_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([None, None]) is None
    assert Spread.of([3.0]) == Spread(3.0, None, 0)
    assert Spread.of([1.0, None]) == Spread(1.0, None, 1)
    # Deviations of 2, 4, 9 from their mean 5 are -3, -1, 4: variance (9 + 1 + 16) / 2.
    assert Spread.of([2.0, 4.0, 9.0]) == Spread(5.0, pytest.approx(math.sqrt(13)), 0)  # type: ignore[arg-type]


def test_target_and_ratios_by_hand(found: list[Section]) -> None:
    (section,) = found
    dense, sparse = section.entries
    # The mean of 0.80 and 0.84 less a point; rounds of FedAvg take 1 + 1 + 1 s, of FedPaI-U 1 + 1 + 0.02 s.
    assert section.target == pytest.approx(0.81)
    assert dense.accuracy == Spread(pytest.approx(0.82), pytest.approx(0.04 / math.sqrt(2)), 0)  # type: ignore[arg-type]
    # Seed 0 ends with 0.80 and never reaches 0.81; seed 1 does in round 1.
    assert dense.target_seconds == Spread(pytest.approx(3.0), None, 1)  # type: ignore[arg-type]
    assert sparse.target_seconds == Spread(pytest.approx(2.02), None, 1)  # type: ignore[arg-type]
    assert sparse.sooner is None, "a seed that never gets there has no ratio"
    # Personalised: 0.9 in round 1, and never in the other seed, whose best is 0.8.
    assert sparse.personal_target_seconds == Spread(pytest.approx(2.02), None, 1)  # type: ignore[arg-type]
    assert sparse.accuracy_gap == pytest.approx(100 * (0.81 - 0.82))
    assert sparse.uplink_share == pytest.approx(0.02)
    assert sparse.step_speed == pytest.approx(100 / 12.5)
    assert sparse.personal_accuracy is not None
    assert sparse.personal_accuracy.mean == pytest.approx(0.7)
    assert sparse.sent is not None
    assert sparse.sent.mean == 2 * 1002


def test_sooner_by_hand() -> None:
    cells = expand({"method": ["fedavg", "random"]}, {})
    finished = [
        Finished(cells[0], rows("fedavg", [0.1, 0.5, 0.80]), MACHINE),
        Finished(cells[1], rows("random", [0.1, 0.80, 0.79], None, 2), MACHINE),
    ]
    (section,) = sections(result_rows(finished, LINK, None))
    assert section.entries[1].sooner == pytest.approx(6.0 / 2.02)
    (section,) = sections(result_rows(finished, LINK, 0.5))
    assert (section.target, section.entries[1].sooner) == (0.5, pytest.approx(3.0 / 2.02))


def test_without_fedavg_there_is_no_target_and_no_ratio() -> None:
    (cell,) = expand({"method": ["random"]}, {})
    (section,) = sections(result_rows([Finished(cell, rows("random", [0.1, 0.8]), MACHINE)], LINK, None))
    (entry,) = section.entries
    assert (section.target, entry.accuracy_gap, entry.uplink_share, entry.sooner) == (None, None, None, None)
    assert "to target, s" in tables.table(section).head


def test_a_method_without_a_global_model() -> None:
    cells = expand({"method": ["fedavg", "random"]}, {})
    finished = [
        Finished(cells[0], rows("fedavg", [0.1, 0.8]), MACHINE),
        Finished(cells[1], rows("random", [None, None, None], [None, 0.7, 0.9]), MACHINE),
    ]
    finished[1].rows[-1].update(held_accuracy=0.85, density=0.04)
    (section,) = sections(result_rows(finished, LINK, None))
    line = tables.table(section).rows[1]
    head = tables.table(section).head
    assert line[head.index("accuracy, %")] == "-"
    assert line[head.index("personalised, %")] == "85.00"
    assert line[head.index("personalised, s")] == "6.00"
    assert line[head.index("kept, %")] == "4", "after the last round, not on average"


def test_the_table(found: list[Section]) -> None:
    table = tables.table(found[0])
    assert table.title == "resnet18, IID: mean ± standard deviation over 2 seeds"
    assert "to 81.00 %, s" in table.head
    assert list(table.rows[1]) == [
        *("fedpai-u 98 %", "2", "81.00 ± 2.83", "-1.00", "70.00 ± 14.14", "0.00000200", "2.00 %", "0.00100"),
        *("12.5 ± 3.5", "8.0x", "2.02 (1 not)", "-", "2.02 (1 not)"),
    ]


def test_the_page_holds_every_number_and_nothing_from_outside(found: list[Section], tmp_path: Path) -> None:
    all_rows = [row for entry in found[0].entries for row in entry.rows]
    file = tmp_path / "report.html"
    page.write(file, found, all_rows, {"rounds": 2, "alpha": None}, left=3)
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[a-z]|<script|<link|url\(|@import|<img", text) == []
    for cell in (*tables.table(found[0]).head, *tables.table(found[0]).rows[1]):
        assert cell in text
    for words in ("4 runs, 3 more not finished yet", "100 B/s up and 1 kB/s down", "Target: 81.00 %", "<dd>a CPU</dd>"):
        assert words in text
    for heading in ("Accuracy over sparsity", "Accuracy over compute", "Accuracy over seconds", "Accuracy over bytes"):
        assert f"<h2>{heading}</h2>" in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    for svg in svgs:
        assert not re.search(r"nan|inf", re.sub(r"<(text|title).*?</\1>", "", svg))
        drawn = ElementTree.fromstring(svg)
        assert {"s0", "s1"} <= {word for dot in drawn.iter("circle") for word in dot.attrib["class"].split()}
    assert "fedpai-u: 2, 81 ± 2.83" in svgs[0], "kept %, accuracy and its deviation"
    assert "fedpai-u, personalised: 2, 70 ± 14.1" in svgs[0]


def test_entries_are_json(found: list[Section]) -> None:
    plain = entry_rows(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain[0]["cells"] == ["resnet18-fedavg-iid-seed0", "resnet18-fedavg-iid-seed1"]
    assert plain[1]["accuracy"]["mean"] == pytest.approx(0.81)


def test_a_bar_over_cells() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = GridProgress(stream, total=4, done=1)
    first, second = bar.cell("resnet18-fedavg-iid-seed0"), bar.cell("resnet18-fedavg-iid-seed1")
    first.begin(("fedavg",), 2, 0)
    second.begin(("fedavg",), 2, 0)
    for row in rows("fedavg", [0.1, 0.2, 0.3]):
        first.row(row)
    assert "1.7/4 cells" in stream.getvalue(), "one cell and two of three rounds of the next"
    second.row(rows("fedavg", [0.1, 0.2])[1])
    assert "2.0/4 cells" in stream.getvalue(), "and one of a third"
    bar.finished("resnet18-fedavg-iid-seed0")
    bar.close()
    text = stream.getvalue()
    assert "2.3/4 cells" in text
    assert "[2/4] resnet18-fedavg-iid-seed0: fedavg             round   2  accuracy 30.00 %" in text
