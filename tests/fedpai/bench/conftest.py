# SPDX-License-Identifier: Apache-2.0
"""Measurements so small that they take a second, and a machine that needs no measuring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpai import cli
from fedpai.bench import machine
from fedpai.bench.step_rivals import CONTENDERS, Trainer

MODEL = machine.MachineModel(
    100.0, ((1 << 14, 60.0), (1 << 18, 50.0)), (1.2, 1.1), ((1 << 20, 40.0), (1 << 24, 10.0))
)
FEW = ("--samples", "2", "--min-time", "0.01", "--threads", "1")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Runs `fedpai bench` with few samples and gives the rows that it wrote."""
    monkeypatch.setattr(machine, "measure_machine", lambda: MODEL)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> list[dict[str, Any]]:
        file = tmp_path / "rows.jsonl"
        file.unlink(missing_ok=True)
        assert cli.main(["bench", *arguments, *FEW, "--json", str(file)]) == 0
        return [json.loads(line) for line in file.read_text().splitlines()]

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our contender's network gives twice what it should."""
    ours = CONTENDERS["ours"]

    def twice(task: Any, compiled: bool) -> dict[str, Callable[[], Trainer | str]]:
        def build() -> Trainer:
            trainer = ours(task, compiled)["sparsify_"]()
            assert isinstance(trainer, Trainer)
            network = trainer.network
            trainer.network = lambda x: 2.0 * network(x)
            return trainer

        return {"sparsify_": build}

    monkeypatch.setitem(CONTENDERS, "ours", twice)
