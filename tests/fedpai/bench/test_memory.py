# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step --memory` on small networks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpai import cli
from fedpai.bench import memory, memory_child
from fedpai.bench import rows as bench_rows
from fedpai.bench.memory_text import memory_table, remarks
from fedpai.bench.step import task_of
from fedpai.bench.step_rivals import BF16, Expected, masked_losses

Bench = Callable[..., list[dict[str, Any]]]
MEGABYTE = 1_000_000


@pytest.mark.alone
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_and_table(
    bench: Bench, few: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of useful size: at 98 % ours takes less than dense torch in either format."""
    if few:  # each is a process that imports torch
        kept = dict.fromkeys([("ours", "sparsify_"), memory.PLAIN])
        monkeypatch.setattr(memory, "TRAINERS", kept)
    (row,) = bench("step", "--memory", "--model", "conv4", "--batch", "8")
    assert bench_rows.check(row) == ""
    assert (row["row"], row["model"], row["mask"], row["sparsity"]) == ("memory", "conv4", "uniform", 0.98)
    assert (row["batch"], row["threads"], row["steps"]) == (8, 1, memory.STEPS)
    assert {name: list(variants) for name, variants in row["peaks"].items()} == {
        "ours": ["sparsify_"] if few else ["sparsify_", "sparsify_, fuse=False"],
        "dense": ["contiguous, eager"] if few else ["contiguous, eager", "channels_last, eager"],
    }
    ours, dense = row["peaks"]["ours"], row["peaks"]["dense"]
    for numbers in (*ours.values(), *dense.values()):
        assert numbers["peak_bytes"] > MEGABYTE
        assert numbers["start_bytes"] > MEGABYTE
        plain = dense["contiguous, eager"]["peak_bytes"]
        assert numbers["of_dense"] == pytest.approx(numbers["peak_bytes"] / plain, abs=1e-6)
        assert ("peak_live_bytes" in numbers) == (numbers in ours.values())
    assert max(n["peak_bytes"] for n in ours.values()) < min(n["peak_bytes"] for n in dense.values())
    assert all(n["peak_live_bytes"] > 0 for n in ours.values())
    printed = capsys.readouterr().out
    for words in ("memory of training, batch 8, 5 steps", "uniform 98 %", "contiguous, eager", "100.0 %"):
        assert words in printed


def test_ours_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dense torch there is no share; every network and sparsity has its row."""
    jobs: list[tuple[Any, ...]] = []
    task, _ = task_of("mlp", "uniform", 0.9, 4)
    losses = masked_losses(task).losses
    monkeypatch.setattr(memory, "masked_losses", lambda task: Expected(losses, [0.0] * len(losses)))

    def figures(job: dict[str, Any], label: str) -> dict[str, Any]:
        jobs.append((label, job["variant"], job["batch"], job["threads"]))
        assert Path(job["masks"]).is_file()
        kept = torch.load(job["masks"], weights_only=True)
        assert all(mask.dtype == torch.bool for mask in kept.values())
        return {"method": memory_child.RESET, "start_bytes": 1, "peak_bytes": 5 * MEGABYTE, "losses": losses}

    monkeypatch.setattr(memory, "run_child", figures)
    arguments = ("--model", "mlp,lenet5", "--sparsity", "0.9,0.8", "--batch", "4", "--rivals", "none")
    arguments += ("--structure", "2x1")
    rows = bench("step", "--memory", *arguments)
    assert [(row["model"], row["sparsity"]) for row in rows] == [
        ("mlp", 0.9), ("mlp", 0.8), ("lenet5", 0.9), ("lenet5", 0.8)
    ]  # fmt: skip
    assert [list(row["peaks"]) for row in rows] == [["ours"]] * 4
    assert jobs[:2] == [("mlp, uniform 0.9", v, 4, 1) for v in ("sparsify_", "sparsify_, fuse=False")]
    assert {row["structure"] for row in rows} == {memory_table(rows).rows[0][2]} == {"2x1"}
    assert memory_table(rows).rows[0][5:] == ["5.00", "-", "-"]
    assert "of_dense" not in rows[0]["peaks"]["ours"]["sparsify_"]


def test_wrong_losses_are_not_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"method": memory_child.RESET, "start_bytes": 1, "peak_bytes": 1, "losses": [7.0] * memory.STEPS}
    monkeypatch.setattr(memory, "run_child", lambda job, label: dict(found))
    assert cli.main(["bench", "step", "--memory", "--model", "mlp", "--batch", "4"]) == cli.ERROR
    assert "ours, sparsify_: not counted, because it is wrong: loss of step 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise MemoryError('no more')", "its process failed: MemoryError: no more"),
        ("raise SystemExit(3)", "its process failed: exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL (out of memory?)"),
        (
            'print(\'{"peak_bytes": 0, "method": "VmHWM"}\')',
            "the peak is not above the start, as VmHWM tells it",
        ),
    ],
)
def test_a_child_that_fails(
    code: str, words: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the contender."""
    monkeypatch.setattr(memory, "_CODE", code)
    assert cli.main(["bench", "step", "--memory", "--model", "mlp", "--batch", "4"]) == cli.ERROR
    error = capsys.readouterr().err
    assert f"mlp, uniform 0.98: ours, sparsify_: {words}" in error
    assert error.count("\n") == 1


def test_the_child_imports_from_where_its_parent_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "fedpai" / "bench"
    package.mkdir(parents=True)
    for file in (tmp_path / "fedpai" / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "memory_child.py").write_text("def main(text):\n    print('noise\\n{\"peak_bytes\": 7}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert memory.run_child({"contender": "ours", "variant": "v"}, "m") == {"peak_bytes": 7}


@pytest.mark.alone
@pytest.mark.parametrize("missing", ["nothing", "_CLEAR", "both"])
def test_growth_is_seen(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of the ways to read it that this system has."""
    nowhere = Path("/nowhere/at/all")
    if missing != "nothing":
        monkeypatch.setattr(memory_child, "_CLEAR", nowhere)
    if missing == "both":
        monkeypatch.setattr(memory_child, "_STATUS", nowhere)
    method, start = memory_child.begin()
    known = {"nothing": memory_child.RESET, "_CLEAR": memory_child.NOT_RESET, "both": memory_child.MAXRSS}
    if sys.platform == "linux" and (missing != "nothing" or method == memory_child.RESET):
        assert method == known[missing]
    assert start > MEGABYTE
    size = 64 * MEGABYTE
    torch.ones(size, dtype=torch.uint8)
    grown = memory_child.peak(method) - start
    assert grown >= (0 if method == memory_child.MAXRSS else 0.9 * size)
    if method == memory_child.RESET:
        assert grown < 1.5 * size
        memory_child.begin()
        assert memory_child.peak(method) < start + 0.5 * size
    assert len(remarks([{"method": method}])) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rivals", "sparseprop"], "--rivals: --memory compares with dense torch alone"),
        (["--model", "resnet19"], "--model: name: unknown model 'resnet19'"),
        (["--sparsity", "1"], "--sparsity: got 1, expected less than 1"),
    ],
)
def test_mistakes_are_one_line(
    bench: Bench, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "step", "--memory", *arguments]) == cli.ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_memory_or_profile(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "step", "--memory", "--profile"])
    assert stop.value.code == cli.ERROR
    assert "argument --profile: not allowed with argument --memory" in capsys.readouterr().err


def test_bf16_activations_are_measured_on_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    variants: list[str] = []
    task, _ = task_of("mlp", "uniform", 0.9, 4)
    losses = masked_losses(task).losses
    monkeypatch.setattr(memory, "masked_losses", lambda task: Expected(losses, [0.0] * len(losses)))

    def figures(job: dict[str, Any], label: str) -> dict[str, Any]:
        variants.append(job["variant"])
        found = [losses[0], 2.0, 1.0] if job["variant"] == BF16 else losses  # rounded gradients
        return {"method": memory_child.RESET, "start_bytes": 1, "peak_bytes": MEGABYTE, "losses": list(found)}

    monkeypatch.setattr(memory, "run_child", figures)
    arguments = ("--model", "mlp", "--sparsity", "0.9", "--batch", "4", "--rivals", "none")
    bench("step", "--memory", *arguments)
    assert BF16 not in variants
    (row,) = bench("step", "--memory", "--activation-dtype", "bf16", *arguments)
    assert list(row["peaks"]["ours"]) == ["sparsify_", BF16, "sparsify_, fuse=False"]
