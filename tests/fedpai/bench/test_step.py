# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step` on small networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedpai import cli
from fedpai.bench import rows as bench_rows
from fedpai.bench.rivals.sparseprop import installed
from fedpai.bench.step import task_of
from fedpai.bench.step_rivals import BF16, CHECKED_STEPS, CONTENDERS, Trainer, masked_losses

Bench = Callable[..., list[dict[str, Any]]]


def test_rows_and_table(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("step", "--model", "lenet5,mlp", "--sparsity", "0.9,0.8", "--batch", "8", "--no-compile")
    assert [(row["model"], row["sparsity"]) for row in found] == [
        ("lenet5", 0.9), ("lenet5", 0.8), ("mlp", 0.9), ("mlp", 0.8)
    ]  # fmt: skip
    for row in found:
        assert bench_rows.check(row) == ""
        assert row["density"] == pytest.approx(1 - row["sparsity"], abs=1e-3)
        assert set(row["results"]["dense"]["variants"]) == {"contiguous, eager", "channels_last, eager"}
        assert row["results"]["ours"]["best"] == "sparsify_"
        assert sum(row["layers"].values()) == (5 if row["model"] == "lenet5" else 3)
        masked = row["losses"]["dense-masked"]
        assert len(masked) == CHECKED_STEPS
        assert row["losses"]["ours, sparsify_"] == pytest.approx(masked, rel=1e-4)
        assert row["losses"]["dense, contiguous, eager"][0] == pytest.approx(masked[0], rel=1e-4)
        for name in ("ours", "dense"):
            for numbers in row["results"][name]["variants"].values():
                assert numbers["first_step_ms"] > 0
                assert ("convert_ms" in numbers) is (name == "ours")
        assert row["break_evens"].startswith("built in: ")
    printed = capsys.readouterr().out
    for words in ("whole training step, batch 8", "uniform 90 %", "of the dense multiply-adds", "converted in "):
        assert words in printed


def test_criterion_with_data(bench: Bench) -> None:
    (row,) = bench(
        "step", "--model", "lenet5", "--mask", "snip", "--mask-data", "synthetic-gray", "--sparsity", "0.9",
        "--batch", "8", "--rivals", "none",
    )  # fmt: skip
    assert (row["mask"], row["mask_data"]) == ("snip", "synthetic-gray")
    assert row["mac_share"] > 0.1
    assert row["speedup"] == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_dense(bench: Bench) -> None:
    (row,) = bench("step", "--model", "mlp", "--batch", "8", "--rivals", "dense")
    assert set(row["results"]["dense"]["variants"]) == {
        "contiguous, eager", "contiguous, compiled", "channels_last, eager", "channels_last, compiled"
    }  # fmt: skip


def test_a_compiler_that_fails_is_no_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(network: nn.Module, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    (row,) = bench("step", "--model", "mlp", "--batch", "8", "--rivals", "dense")
    assert set(row["results"]["dense"]["variants"]) == {"contiguous, eager", "channels_last, eager"}
    assert "contiguous, compiled: failed: no compiler" in row["results"]["dense"]["reason"]
    assert "failed: no compiler" in capsys.readouterr().out


@pytest.mark.usefixtures("ours_is_wrong")
def test_losses_that_differ_are_wrong(bench: Bench) -> None:
    (row,) = bench("step", "--model", "mlp", "--batch", "8", "--no-compile", "--rivals", "dense")
    assert row["results"]["ours"]["status"] == "wrong"
    assert "loss of step 1 is" in row["results"]["ours"]["reason"]
    assert row["speedup"] == {}


@pytest.mark.parametrize(("step", "wrong"), [(0, True), (2, True), (0, False)])
def test_losses_are_compared_step_by_step(step: int, wrong: bool) -> None:
    task, _ = task_of("mlp", "uniform", 0.9, 8)
    expected = masked_losses(task)
    found = list(expected.losses)
    found[step] *= 1.01 if wrong else 1 + 1e-6
    assert (expected.problem(found, masked=True) != "") is wrong
    assert expected.problem([float("nan")] * CHECKED_STEPS, masked=True) != ""
    if step:  # torch that trains all weights agrees in its first loss only
        assert expected.problem(found, masked=False) == ""


@pytest.mark.skipif(not installed(), reason="sparseprop is not installed")
def test_sparseprop_trains_the_same_network() -> None:
    task, _ = task_of("conv4", "uniform", 0.98, 8)
    trainer = CONTENDERS["sparseprop"](task, False)["swap_modules_with_sparse"]()
    assert isinstance(trainer, Trainer)
    losses = [float(trainer.step()) for _ in range(CHECKED_STEPS)]
    assert masked_losses(task).problem(losses, trainer.masked) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet19"], "--model: name: unknown model 'resnet19'"),
        (["--mask", "erkk"], "--mask: unknown kind 'erkk'"),
        (
            ["--rivals", "torch.sparse"],
            "--rivals: unknown name 'torch.sparse', expected one of dense, sparseprop",
        ),
        (["--sparsity", "1"], "--sparsity: got 1, expected less than 1"),
        (["--mask", "grasp", "--mask-data", "cifar10"], "--mask-data: cifar10"),
    ],
)
def test_mistakes_are_one_line(
    bench: Bench, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "step", *arguments]) == cli.ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_bf16_activations_are_a_variant_on_request(bench: Bench) -> None:
    (row,) = bench("step", "--model", "lenet5", "--batch", "8", "--rivals", "none", "--activation-dtype", "bf16")
    assert set(row["results"]["ours"]["variants"]) == {"sparsify_", BF16}
    plain, rounded = row["losses"]["ours, sparsify_"], row["losses"][f"ours, {BF16}"]
    assert plain[0] == rounded[0]
    assert rounded == pytest.approx(plain, rel=0.05)


def test_rounded_gradients_excuse_later_losses_only() -> None:
    task, _ = task_of("mlp", "uniform", 0.9, 8)
    expected = masked_losses(task)
    found = [expected.losses[0], 2.0, 1.0]
    assert expected.problem(found, masked=True, exact=False) == ""
    assert expected.problem([9.0, *expected.losses[1:]], masked=True, exact=False) != ""


def test_no_profile_of_bf16_activations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--profile", "--activation-dtype", "bf16"]) == cli.ERROR
    assert "--activation-dtype: --profile looks at the step as it is by default" in capsys.readouterr().err
