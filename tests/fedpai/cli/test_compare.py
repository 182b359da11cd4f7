# SPDX-License-Identifier: Apache-2.0
"""`fedpai compare` as a user meets it: results, mistakes, interruptions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpai import cli
from fedpai.cli import compare as compare_command
from fedpai.cli.options import explicit_settings
from fedpai.compare.presets import PRESETS
from fedpai.compare.progress import CellProgress, GridProgress
from fedpai.federation.folder import held

PAGE = Path(__file__).parents[3] / "docs" / "compare.md"
Read = Callable[[Path], list[dict[str, Any]]]

TINY = [
    *("--model", "mlp", "--width", "0.125", "--data", "synthetic-gray", "--clients", "3", "--rounds", "2"),
    *("--batch", "16", "--max-images", "32", "--eval-images", "40", "--threads", "1"),
]
GRID = ["compare", *TINY, "--method", "fedavg,random", "--sparsity", "0.8,0.9", "--alpha", "iid,0.5"]


def cells(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "cells").iterdir())


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_grid(tmp_path: Path, untimed: Read, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "grid", tmp_path / "rows.jsonl"
    assert cli.main([*GRID, "--seed", "0,1", "--out", str(out), "--json", str(file)]) == 0
    printed, progress = capsys.readouterr()
    assert len(cells(out)) == 12
    assert progress.count("took") == 12
    assert "[12/12] mlp-random-0.9-alpha0.5-seed1: random             round   2" in progress
    for words in (
        "mlp, IID: mean ± standard deviation over 2 seeds",
        "mlp, Dirichlet 0.5: mean ± standard deviation over 2 seeds",
        "random 80 %",
        "times over a link of 1 MB/s up, 10 MB/s down",
        f"report: {out / 'report.html'}",
    ):
        assert words in printed
    assert {path.name for path in out.iterdir()} == {"compare.json", "cells", "results.jsonl", "report.html"}
    rows = results(out)
    assert [row["cell"] for row in rows][:3] == [
        "mlp-fedavg-iid-seed0",
        "mlp-random-0.8-iid-seed0",
        "mlp-random-0.9-iid-seed0",
    ]
    for row in rows:
        metrics = untimed(out / "cells" / row["cell"])
        assert row["accuracy"] == row["curve"]["accuracy"][-1] == metrics[-1]["accuracy"]
        assert row["total_up"] == sum(one["bytes_up"] for one in metrics[1:])
        assert len(row["curve"]["seconds"]) == 3
        assert row["machine"]["threads"] == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["grid", *["cell"] * 12, *["entry"] * 6]
    assert lines[1:13] == rows

    plain = tmp_path / "plain"
    words = ["--method", "random", "--sparsity", "0.9", "--alpha", "0.5", "--seed", "1", "--out", str(plain)]
    assert cli.main(["run", *TINY, "--no-profile", *words]) == 0
    assert untimed(plain) == untimed(out / "cells" / "mlp-random-0.9-alpha0.5-seed1"), "a cell is a normal run"


def test_the_smoke_preset_on_generated_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--alpha", "iid", "--seed", "0", "--sparsity", "0.9", "--mask-mode", "shared,personal"]
    assert cli.main(["compare", "--preset", "fashion-smoke", *TINY, *words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "fedpai-u personal 90 %" in printed
    assert "personalised, %" in printed
    assert [row["family"] for row in results(tmp_path)] == ["fedavg", "fedpai-u shared", "fedpai-u personal"]


class StopAt(GridProgress):
    """Raises KeyboardInterrupt after so many training steps of all cells together, as Ctrl-C would."""

    left = 0

    def cell(self, name: str) -> CellProgress:
        cell = super().cell(name)
        cell.step = self.count  # type: ignore[method-assign]
        return cell

    @staticmethod
    def count(number: int, count: int) -> None:
        StopAt.left -= 1
        if StopAt.left == 0:
            raise KeyboardInterrupt


def test_interrupted_and_resumed_is_the_uninterrupted_grid(
    tmp_path: Path, untimed: Read, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["compare", *TINY, "--method", "fedavg,random", "--sparsity", "0.8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([*grid, "--out", str(whole)]) == 0
    monkeypatch.setattr(compare_command, "GridProgress", StopAt)
    # 2 rounds of 3 clients with 2 steps each are 12 steps a cell; 8 more stop the second cell in its second round.
    StopAt.left = 20
    assert cli.main([*grid, "--out", str(cut)]) == cli.INTERRUPTED
    error = capsys.readouterr().err
    assert "stopped; 1 of 2 runs are finished and kept" in error
    assert f"go on with: fedpai compare --resume --out {cut}" in error
    assert [row["round"] for row in untimed(cut / "cells" / "mlp-random-0.8-iid-seed0")] == [0, 1]
    finished = {file: file.read_bytes() for file in (cut / "cells" / "mlp-fedavg-iid-seed0").iterdir()}
    assert cli.main(["compare", "--resume", "--out", str(cut)]) == 0
    assert {file: file.read_bytes() for file in finished} == finished
    assert cells(cut) == cells(whole)
    for name in cells(whole):
        assert untimed(cut / "cells" / name) == untimed(whole / "cells" / name)
        for path in (whole / "cells" / name).glob("*.safetensors"):
            assert (cut / "cells" / name / path.name).read_bytes() == path.read_bytes()
    assert [row["accuracy"] for row in results(cut)] == [row["accuracy"] for row in results(whole)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid of one cell."""
    out: Path = tmp_path_factory.mktemp("compare") / "small"
    words = ["--method", "random", "--sparsity", "0.8", "--rounds", "1", "--out", str(out)]
    assert cli.main(["compare", *TINY, *words]) == 0
    return out


def test_an_axis_may_grow_and_the_link_may_change(small: Path) -> None:
    (before,) = results(small)
    metrics = (small / "cells" / before["cell"] / "metrics.jsonl").read_bytes()
    words = ["--seed", "0,1", "--uplink", "8Kbit/s", "--target-accuracy", "0.001"]
    assert cli.main(["compare", "--resume", "--out", str(small), *words]) == 0
    after = results(small)
    assert [row["seed"] for row in after] == [0, 1]
    assert (small / "cells" / before["cell"] / "metrics.jsonl").read_bytes() == metrics
    assert after[0]["link"] == {"uplink": 1000.0, "downlink": 1e7, "slowdown": 1.0}
    assert after[0]["times"]["seconds"] > before["times"]["seconds"]
    assert (before["times"]["target"], after[0]["times"]["target"]) == (None, 0.001)
    unchanged = before.keys() - {"link", "times", "curve"}
    assert {key: after[0][key] for key in unchanged} == {key: before[key] for key in unchanged}
    assert cli.main(["compare", "--resume", "--out", str(small)]) == 0, "the link is kept"
    assert results(small) == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "already holds a grid; go on with it by --resume"),
        (["--resume", "--lr", "0.1"], "is a grid of other settings: lr: 0.05 in the folder, 0.1 asked for"),
        (["--resume", "--criterion", "snip"], "--criterion means nothing to random"),
    ],
)
def test_a_grid_that_is_there(
    small: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in small.glob("*.*")}
    assert cli.main(["compare", *arguments, "--out", str(small)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert {path: path.read_bytes() for path in small.glob("*.*")} == before


def test_a_grid_that_another_process_is_at_work_on(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, or a run that the process of a killed grid goes on with to the end of its round."""
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    resume = ["compare", "--resume", "--out", str(small)]
    with held(small):
        assert cli.main([*resume, "--seed", "7"]) == 2
    assert f"another process is at work in {small}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    cell = small / "cells" / "mlp-random-0.8-iid-seed7"
    with held(cell):
        assert cli.main([*resume, "--seed", "0,7"]) == 2
    assert f"another process is at work in {cell}" in capsys.readouterr().err
    assert cli.main([*resume, "--seed", "0,7"]) == 0
    assert cli.main([*resume, "--seed", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "fedavg,nope"], "unknown --method 'nope', expected one of: fedavg"),
        (["--method", "fedavg,"], "argument --method: got 'fedavg,', which has an empty place"),
        (["--seed", "0,0"], "argument --seed: got '0,0', which has 0 twice"),
        (["--seed", "0,x"], "argument --seed: invalid int value: '0,x'"),
        (["--sparsity", "0.9,2"], "--sparsity must lie in [0.0, 1.0), got 2.0"),
        (["--alpha", "iid,many"], "argument --alpha: expected a positive number or iid, got 'many'"),
        (["--alpha", "iid,iid"], "argument --alpha: got 'iid,iid', which has iid twice"),
        (["--method", "fedavg", "--sparsity", "0.9"], "--sparsity means nothing to fedavg"),
        (["--method", "fedavg,random", "--mask-mode", "personal"], "--mask-mode means nothing to fedavg and random"),
        (["--rounds", "1,2"], "argument --rounds: invalid int value: '1,2'"),
        (["--model", "mlp,resnet19"], "--model resnet19: unknown model"),
        (["--baseline", "fedavg"], "unrecognized arguments: --baseline fedavg"),
        (["--preset", "huge"], "unknown --preset 'huge', expected one of: fashion-smoke, study, sooner, full"),
        (["--uplink", "1Mb/s"], "argument --uplink: got '1Mb/s', expected a positive rate with its unit"),
        (["--device-slowdown", "0"], "argument --device-slowdown: expected a positive number, got '0'"),
        (["--target-accuracy", "85"], "argument --target-accuracy: expected a share in (0, 1] such as 0.85, got 85"),
        (["--json", "/nowhere/rows.jsonl"], "--json /nowhere/rows.jsonl: /nowhere is no folder"),
        (["--resume"], "grid holds no grid to go on with (no compare.json)"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["compare", *TINY, *arguments, "--out", str(tmp_path / "grid")])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else -1
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == [], "a mistake leaves no folder"


def test_folders_that_hold_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *TINY]) == 2
    assert "--out DIR is needed" in capsys.readouterr().err
    (tmp_path / "compare.json").write_text('{"axes": {"colour": []}, "settings": {}, "times": {}}')
    assert cli.main(["compare", "--resume", "--out", str(tmp_path)]) == 2
    assert "compare.json cannot be used" in capsys.readouterr().err
    (tmp_path / "compare.json").write_text("{")
    assert cli.main(["compare", "--resume", "--out", str(tmp_path)]) == 2
    (tmp_path / "compare.json").unlink()
    (tmp_path / "file").write_text("x")
    assert cli.main(["compare", *TINY, "--out", str(tmp_path)]) == 2
    assert "is not empty and is no run folder" in capsys.readouterr().err


def test_the_commands_of_the_page_and_of_the_help_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8") + compare_command.EPILOG
    commands = [line.split("   ")[0].split()[1:] for line in re.findall(r"^ +(fedpai compare .*)$", text, re.M)]
    assert len(commands) == 11
    for words in commands:
        given = vars(cli.build_parser().parse_args(words))
        axes, settings = compare_command.asked(explicit_settings(given), given.get("preset"))
        assert given["out"].parts[0] == "runs"
        assert not settings.keys() & axes.keys()


def test_the_page_lists_every_preset() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"| `{name}` |" not in text] == []
