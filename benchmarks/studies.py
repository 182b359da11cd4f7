# SPDX-License-Identifier: Apache-2.0
"""Renders the committed studies into docs/studies.md: python benchmarks/studies.py [--check]

``benchmarks/results/studies/<name>.jsonl`` is what ``fedpai compare --json`` wrote for one grid. In the document it
goes between ``<!-- study <name>: <plots> -->`` and ``<!-- end <name> -->``: the command, the machine, one table for
each network and partition, and those plots, which are written to docs/plots. Plots are kept, step, bytes or seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpai.bench import BenchError
from fedpai.cli.compare import TIMES, asked
from fedpai.compare import page, results
from fedpai.compare.presets import PRESETS
from fedpai.federation.config import option
from fedpai.federation.link_speed import LinkSpeed
from fedpai.report.charts import standalone

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
MARK = re.compile(
    r"<!-- study (?P<name>[a-z0-9-]+): (?P<plots>[a-z, ]+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the document and its plots, or with ``--check`` says whether they are up to date (exit code 1 if not)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of *.jsonl files")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where docs/ is")
    arguments = parser.parse_args(argv)
    document = arguments.root / "docs" / "studies.md"
    try:
        new = rendered(document, arguments.results)
    except (BenchError, OSError) as error:
        print(f"studies: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if arguments.check:
            print(f"{path} is out of date: run python benchmarks/studies.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text := new[path], encoding="utf-8")
            print(f"wrote {path}, {len(text)} characters")
    return 1 if arguments.check and stale else 0


def rendered(document: Path, folder: Path) -> dict[Path, str]:
    """The document and its plots as they should be.

    Raises:
        BenchError: a study without a place in the document, a place without a study, or a file that is no study.
    """
    text = document.read_text(encoding="utf-8")
    named, there = [mark["name"] for mark in MARK.finditer(text)], sorted(path.stem for path in folder.glob("*.jsonl"))
    if sorted(named) != there:
        raise BenchError(f"{document} has places for {sorted(named)}, {folder} has {there}")
    files: dict[Path, str] = {}

    def place(mark: re.Match[str]) -> str:
        name, kinds = mark["name"], mark["plots"].split(", ")
        rows = read(folder / f"{name}.jsonl")
        grid = next((row for row in rows if row["row"] == "grid"), None)
        cells = [row for row in rows if row["row"] == "cell"]
        if grid is None or not cells:
            raise BenchError(f"{folder / name}.jsonl: expected a row 'grid' and rows 'cell' of fedpai compare")
        parts = [f"    {command(name, grid, jobs(cells))}", about(cells)]
        for section in results.sections(cells):
            found = page.part(section)
            parts += [f"**{found.table.title}**", found.table.to_markdown()]
            pictures = []
            for kind in kinds:
                path = document.parent / "plots" / f"{name}-{found.anchor}-{kind}.svg"
                files[path] = standalone(found.charts[kind], found.legend)
                pictures.append(f"![{kind}, {found.title}](plots/{path.name})")
            parts.append("\n".join(pictures))
        content = "\n\n".join(parts)
        return f"<!-- study {name}: {mark['plots']} -->\n\n{content}\n\n<!-- end {name} -->"

    files[document] = MARK.sub(place, text)
    return files


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines.

    Raises:
        BenchError: a line that is none, with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BenchError(f"{path}, line {number}: {error}") from None
    return rows


def jobs(cells: Sequence[dict[str, Any]]) -> int:
    """How many runs were carried out side by side."""
    return max(cell["machine"].get("jobs", 1) for cell in cells)


def command(name: str, grid: dict[str, Any], beside: int) -> str:
    """What makes these rows again: the preset of that name, and options for what differs from it."""
    known, words = {}, ["fedpai", "compare"]
    if name in PRESETS:
        axes, settings = asked({}, name)
        known, words = {**axes, **settings}, [*words, "--preset", name]
    for key, value in {**grid["axes"], **grid["settings"]}.items():
        if key not in known or known[key] != value:
            words += [option(key), written(value)]
    spelled = {field: key for key, field in TIMES.items()}
    for field, value in grid["times"].items():
        words += [option(spelled[field]), f"{value:.0f}B/s" if field in ("uplink", "downlink") else str(value)]
    if beside > 1:
        words += ["--jobs", str(beside)]
    return shlex.join([*words, "--out", f"runs/{name}"])


def written(value: Any) -> str:
    """A value as the command line takes it; None is that of an axis or setting that may be switched off."""
    if isinstance(value, list):
        return ",".join(map(written, value))
    return "iid" if value is None else str(value)


def about(cells: Sequence[dict[str, Any]]) -> str:
    """Machine, versions, threads and link."""
    machines = list(dict.fromkeys(_machine(row["machine"]) for row in cells))
    rate = cells[0]["link"]
    link = LinkSpeed(rate["uplink"], rate["downlink"], rate["slowdown"])
    return f"Measured on {'; '.join(machines)}. Times over a link of {link}."


def _machine(row: dict[str, Any]) -> str:
    machine, software = row["machine"], row["software"]
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    beside = f", {row['jobs']} runs side by side" if row.get("jobs", 1) > 1 else ""
    return f"{machine['cpu']}, {threads}{beside}, {row['isa']}, torch {software['torch']}"


if __name__ == "__main__":
    sys.exit(main())
