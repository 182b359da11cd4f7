# SPDX-License-Identifier: Apache-2.0
"""Committed studies: the document says what the rows say, and how to make them again."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import studies
from fedpai.cli.compare import asked
from fedpai.compare.presets import PRESETS
from fedpai.report.charts import Series, line_chart, standalone
from tests.fedpai.compare.test_results import LINK, MACHINE, expand, result_rows, rows
from tests.fedpai.compare.test_results import Finished as Done

SOFTWARE = {"software": {"torch": "2.13.0"}, "isa": "avx2"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A root with one study of two methods and a document with a place for it."""
    axes = {"method": ["fedavg", "random"], "model": ["mlp"], "seed": [0]}
    machine = {**MACHINE, **SOFTWARE, "jobs": 3}
    cells = expand(axes, {"clients": 4, "sample": 4})
    found = [Done(cell, rows(cell.config.method, [0.1, 0.5, 0.75]), machine) for cell in cells]
    grid = {"row": "grid", "axes": axes, "settings": {"clients": 4}, "times": {"uplink": 2e6, "slowdown": 5.0}}
    lines = [grid, *result_rows(found, LINK, None)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "studies.md").write_text("before\n\n<!-- study two: kept -->\nold\n<!-- end two -->\nafter\n")
    return tmp_path


def run(root: Path, *more: str) -> int:
    return studies.main(["--root", str(root), "--results", str(root / "results"), *more])


def test_the_document_is_made_of_the_rows(written: Path) -> None:
    assert run(written, "--check") == 1
    assert run(written) == 0
    text = (written / "docs" / "studies.md").read_text()
    assert text.startswith("before\n\n<!-- study two: kept -->\n\n    fedpai compare --method fedavg,random")
    assert "--clients 4 --uplink 2000000B/s --device-slowdown 5.0 --jobs 3 --out runs/two\n" in text
    assert "Measured on a CPU, 2 threads, 3 runs side by side, avx2, torch 2.13.0. Times over a link of" in text
    assert "| fedavg | 100 | 75.00 | +0.00 |" in text
    assert text.endswith("<!-- end two -->\nafter\n")
    assert "old" not in text
    picture = written / "docs" / "plots" / "two-mlp-iid-kept.svg"
    assert f"](plots/{picture.name})" in text
    ElementTree.parse(picture)
    assert run(written, "--check") == 0
    picture.write_text("changed")
    assert run(written, "--check") == 1


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("three.jsonl", "{}", "has places for ['two'], "),
        ("two.jsonl", "{", "two.jsonl, line 1:"),
        ("two.jsonl", '{"row": "cell"}', "expected a row 'grid' and rows 'cell'"),
    ],
)
def test_what_is_no_study_is_refused(
    written: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, text: str
) -> None:
    (written / "results" / name).write_text(content)
    assert run(written) == 2
    assert text in capsys.readouterr().err
    assert "old" in (written / "docs" / "studies.md").read_text()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_command_of_a_preset_is_its_name(name: str) -> None:
    axes, settings = asked({}, name)
    grid: dict[str, Any] = json.loads(json.dumps({"axes": axes, "settings": settings, "times": {}}))
    assert studies.command(name, grid, 1) == f"fedpai compare --preset {name} --out runs/{name}"
    changed = {**grid, "axes": {**axes, "alpha": [None, 0.3]}, "settings": {**settings, "max_images": None}}
    words = shlex.split(studies.command(name, changed, 1))
    assert words[words.index("--alpha") + 1] == "iid,0.3"


def test_committed_studies_are_in_the_document() -> None:
    assert studies.main(["--check"]) == 0


def test_a_picture_stands_alone() -> None:
    chart = line_chart([Series("a", [(1.0, 2.0), (2.0, 3.0)], "s0")], x_label="x & y", y_label="y")
    picture = standalone(chart, [("first", "s0"), ("second < third", "s1"), ("last", "s2")])
    tree = ElementTree.fromstring(picture)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(tree.itertext())
    assert "second < third" in text
    assert "--s2:" in text
    assert "prefers-color-scheme" not in text
