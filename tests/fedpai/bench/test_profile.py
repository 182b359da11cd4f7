# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step --profile` on small networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import fedpai_kernels
from fedpai import cli
from fedpai.bench import profile
from fedpai.bench import rows as bench_rows
from fedpai.bench.cases import layers_of_network
from fedpai.bench.profile_text import remarks, segments
from fedpai.bench.step_rivals import CONTENDERS, Trainer
from fedpai.bench.trace import PARTS

Bench = Callable[..., list[dict[str, Any]]]


def test_rows_and_tables(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A network with everything that ours computes: norms, residuals, pooling."""
    rows = bench("step", "--profile", "--model", "wrn10x1", "--batch", "16", "--sparsity", "0.9")
    assert [bench_rows.check(row) for row in rows] == [""] * len(rows)
    parts = {row["part"]: row for row in rows if row["layer"] is None}
    expected = {
        "conv forward", "conv backward", "conv weight-grad", "norm forward", "norm backward", "residual add",
        "pooling forward", "pooling backward", "loss", "optimiser", "zero_grad", "layout", "memory",
        "Python and autograd, forward", "Python and autograd, backward", "Python, around them", profile.REMAINDER,
    }  # fmt: skip
    assert expected <= parts.keys()
    assert parts.keys() <= {*PARTS, profile.REMAINDER}
    assert {row["counted"] for row in parts.values()} == {"operation", "gap", "remainder"}
    layers = layers_of_network("wrn10x1")
    convolutions = [case.name for case in layers if case.kind == "conv2d"]
    for part, expected_layers in {
        "conv forward": convolutions,
        "conv backward": convolutions[1:],
        "conv weight-grad": convolutions[:1],  # the images need no gradient
    }.items():
        found = [row["layer"] for row in rows if row["part"] == part and row["layer"]]
        assert sorted(found) == sorted(expected_layers)
    for part, row in parts.items():
        assert row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]
        assert row["share"] == pytest.approx(row["median_ms"] / row["step"]["traced_ms"], abs=1e-4)
        if part.startswith(("conv", "norm")) or part in ("residual add", "optimiser"):
            assert row["bound_ms"] > 0
            assert row["traffic_bytes"] > 0
    printed = capsys.readouterr().out
    for words in ("our step takes", "sum of the medians", "not traced (remainder)", "accounted for:", *convolutions):
        assert words in printed
    assert re.search(r"^F+W+B+", printed, re.MULTILINE)


def test_parts_add_up_to_the_clock(bench: Bench) -> None:
    rows = bench("step", "--profile", "--model", "wrn10x1", "--batch", "32")
    step = rows[0]["step"]
    assert step["samples"] == 2
    assert step["coverage"] == pytest.approx(1, abs=0.05)
    assert step["coverage"] <= 1
    assert 0.5 < step["in_operations"] < step["coverage"]
    assert step["plain_ms"] > 0
    assert step["traced_ms"] > 0
    for part in ("conv forward", "conv weight-grad"):
        whole = next(row for row in rows if row["part"] == part and row["layer"] is None)
        layers = [row for row in rows if row["part"] == part and row["layer"]]
        assert sum(row["useful_flop"] for row in layers) == whole["useful_flop"]
        assert sum(row["bound_ms"] for row in layers) == pytest.approx(whole["bound_ms"], abs=1e-4)


def test_each_step_is_accounted_for_by_itself() -> None:
    """The sum of a step's parts is the time between its first and its last event, on the trace's own clock."""
    from fedpai.bench.step import task_of
    from fedpai.bench.timing import Effort

    task, _ = task_of("wrn10x1", "uniform", 0.9, 16)
    trainer = CONTENDERS["ours"](task, False)["sparsify_"]()
    assert isinstance(trainer, Trainer)
    allocate = fedpai_kernels.memory.empty_strided
    samples = profile.sample(trainer.step, [], Effort(samples=3))
    assert fedpai_kernels.memory.empty_strided is allocate
    assert len(samples.steps) == len(samples.traced) == len(samples.plain) == 3
    for seconds, step in zip(samples.traced, samples.steps, strict=True):
        total = sum(spent.nanoseconds for spent in step.spent.values())
        assert total == pytest.approx(step.nanoseconds, rel=1e-6)
        assert 0 < 1e-9 * total <= seconds


def test_dense_layers_and_criteria(bench: Bench) -> None:
    """What a conversion leaves dense is in the table as well, both of its gradients in one."""
    rows = bench(
        "step", "--profile", "--model", "lenet5", "--mask", "snip", "--mask-data", "synthetic-gray", "--batch", "8",
        "--sparsity", "0.1",
    )  # fmt: skip
    found = {row["part"] for row in rows if row["layer"]}
    assert "linear backward" in found
    assert {row["mask_data"] for row in rows} == {"synthetic-gray"}
    layers = {row["layer"] for row in rows if row["part"] in ("conv forward", "linear forward") and row["layer"]}
    assert layers == {case.name for case in layers_of_network("lenet5")}


def test_remarks_warn() -> None:
    step = {"coverage": 0.9, "in_operations": 0.85, "overhead": 0.2}
    text = "\n".join(remarks([{"step": step, "part": "loss", "layer": None}]))
    assert "90.0 % of the step's clock, 85.0 % in operations and 5.0 % between them" in text
    assert text.count("WARNING") == 2


def test_bar_is_as_wide_as_asked_for() -> None:
    def row(part: str, share: float, counted: str = "operation") -> dict[str, Any]:
        return {"part": part, "layer": None, "counted": counted, "share": share}

    rows = [row("conv forward", 0.5), row("pooling forward", 0.2), row("pooling backward", 0.05)]
    rows += [row("memory", 0.001), row("Python and autograd, forward", 0.25), row("not traced", 0.4, "remainder")]
    found = segments(rows, 40)
    assert "".join(letters for letters, _, _ in found) == "F" * 20 + "P" * 10 + "y" * 10


@pytest.mark.usefixtures("bench", "ours_is_wrong")
def test_wrong_steps_are_not_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--profile", "--model", "mlp", "--batch", "8"]) == cli.ERROR
    assert "not profiled, because it is wrong: loss of step 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rivals", "dense"], "--rivals: --profile looks at our step alone"),
        (["--model", "resnet19"], "--model: name: unknown model 'resnet19'"),
        (["--mask", "erkk"], "--mask: unknown kind 'erkk'"),
        (["--sparsity", "1"], "--sparsity: got 1, expected less than 1"),
    ],
)
def test_mistakes_are_one_line(
    bench: Bench, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "step", "--profile", *arguments]) == cli.ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_layers_have_no_profile(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (("layers", "--profile"), ("step", "--roofline")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", command, option])
        assert stop.value.code == cli.ERROR
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err
