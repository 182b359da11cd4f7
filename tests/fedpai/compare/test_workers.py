# SPDX-License-Identifier: Apache-2.0
"""Runs side by side are the runs one after the other; what happens to a process is said, and none outlives the grid."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpai import cli
from fedpai.compare.workers import Task, WorkerError, side_by_side
from fedpai.federation.config import RunConfig
from fedpai.federation.folder import FolderError
from fedpai.federation.progress import Progress
from tests.fedpai.cli.test_compare import TINY

CONFIG = RunConfig(
    method="random",
    model="mlp",
    width=0.125,
    data="synthetic-gray",
    clients=3,
    sample=3,
    rounds=2,
    batch=16,
    max_images=32,
    eval_images=40,
    threads=1,
)


class OnRow(Progress):
    """Does something once the first round is over."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def row(self, row: dict[str, Any]) -> None:
        self._act()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_same_runs(tmp_path: Path, untimed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["compare", *TINY, "--method", "fedavg,random", "--sparsity", "0.8", "--seed", "0,1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*grid, "--out", str(one)]) == 0
    capsys.readouterr()
    assert cli.main([*grid, "--jobs", "2", "--out", str(two)]) == 0
    progress = capsys.readouterr().err
    assert progress.count("took") == 4
    assert "[4/4] mlp-" in progress
    names = sorted(path.name for path in (one / "cells").iterdir())
    assert len(names) == 4
    for name in names:
        assert untimed(two / "cells" / name) == untimed(one / "cells" / name)
        for path in (one / "cells" / name).glob("*.safetensors"):
            assert (two / "cells" / name / path.name).read_bytes() == path.read_bytes()
        for out, jobs in ((one, 1), (two, 2)):
            assert json.loads((out / "cells" / name / "machine.json").read_text())["jobs"] == jobs
    order = [json.loads(line)["cell"] for line in (two / "results.jsonl").read_text().splitlines()]
    assert order == [json.loads(line)["cell"] for line in (one / "results.jsonl").read_text().splitlines()]


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    def kill() -> None:
        (child,) = multiprocessing.active_children()
        child.kill()

    task = Task("first", tmp_path / "first", CONFIG)
    with pytest.raises(WorkerError, match=r"^first: its process ended with exit code -9 \(-9: killed"):
        list(side_by_side([task], 1, lambda name: OnRow(kill)))
    assert multiprocessing.active_children() == []
    assert list(side_by_side([task], 1, lambda name: Progress())) == ["first"], "it goes on"


def test_a_run_that_fails(tmp_path: Path) -> None:
    other = tmp_path / "second"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG.to_json(), "rounds": 7}))
    tasks = [Task("first", tmp_path / "first", CONFIG), Task("second", other, CONFIG)]
    names = side_by_side(tasks, 1, lambda name: Progress())
    assert next(names) == "first"
    with pytest.raises(FolderError, match="rounds"):
        next(names)
    assert multiprocessing.active_children() == []


def test_stopped_by_hand(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    tasks = [Task(name, tmp_path / name, CONFIG) for name in ("first", "second")]
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(tasks, 2, lambda name: OnRow(stop)))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ("0", "jobs: got 0, expected at least 1"),
        (
            "100000",
            "jobs: 100000 runs side by side, each of 1 thread (--threads), want 100000 cores; there are ",
        ),
    ],
)
def test_more_than_there_are_cores(
    jobs: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    assert cli.main(["compare", *TINY, "--method", "fedavg", "--jobs", jobs, "--out", str(out)]) == cli.ERROR
    assert message in capsys.readouterr().err
    assert not out.exists()
