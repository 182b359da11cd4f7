# SPDX-License-Identifier: Apache-2.0
"""The structure of masks in measurements: asked for, found, shown, and part of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpai import cli
from fedpai.bench import rows as bench_rows
from fedpai.bench.cases import LayerCase, to_csv
from fedpai.bench.masks import uniform_mask
from fedpai.bench.rivals.sparseprop import installed, unsupported
from fedpai.bench.step import task_of
from fedpai.bench.step_rivals import CONTENDERS, Trainer, masked_losses
from fedpai_kernels.structure import check, parse

Bench = Callable[..., list[dict[str, Any]]]

WIDE = LayerCase("wide", "conv2d", 8, 16, (3, 3), (1, 1), (1, 1), image=(4, 4))
TOKENS = LayerCase("tokens", "linear", 16, 24, image=(1, 5))


@pytest.fixture
def layers(tmp_path: Path) -> str:
    path = tmp_path / "tiny.csv"
    path.write_text(to_csv([WIDE, TOKENS]))
    return str(path)


@pytest.mark.parametrize(
    ("structure", "density", "found"),
    [
        ("weight", 0.25, ["weight", "weight"]),
        ("8x1", 0.25, ["8x1", "8x1"]),
        ("4x2-taps", 0.25, ["4x2-taps", "4x2"]),
        ("channel", 0.25, ["channel", "channel"]),
        ("2:4", 0.5, ["2:4", "2:4"]),
        ("fan-in", 0.25, ["fan-in", "fan-in"]),
    ],
)
def test_layers_of_every_structure(
    structure: str,
    density: float,
    found: list[str],
    bench: Bench,
    layers: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checked against the reference as any mask is, rivals too."""
    rows = bench(
        "layers", "--model", layers, "--structure", structure, "--density", f"{density}", "--batch", "16",
        "--kinds", "conv2d,linear", "--directions", "train",
    )  # fmt: skip
    assert [bench_rows.check(row) for row in rows] == ["", ""]
    assert [row["structure"] for row in rows] == [structure] * 2
    assert [row["structure_found"] for row in rows] == found
    assert [row["density"] for row in rows] == pytest.approx([density] * 2, abs=0.01)
    assert {row["results"]["ours"]["status"] for row in rows} == {"ok"}
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("layer "))
    for name, expected in zip(("wide", "tokens"), found, strict=True):
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert line[head.index("structure") :].split()[0] == expected


def test_layers_of_a_transformer(bench: Bench) -> None:
    """By name; a batch is images x tokens. Its rows are those of the file of the same name."""
    rows = bench(
        "layers", "--model", "transformer", "--kinds", "linear", "--batch", "16", "--density", "0.02", "--structure",
        "16x16", "--directions", "forward", "--rivals", "none", "--layers", "attention*",
    )  # fmt: skip
    assert [(row["model"], row["label"]) for row in rows] == [
        ("transformer", "768-2304 linear"), ("transformer", "768-768 linear")
    ]  # fmt: skip
    assert {row["structure_found"] for row in rows} == {"16x16"}
    assert rows[1]["useful_flop"] == 2 * 16 * rows[1]["nnz"]


def test_blocks_of_one_weight_are_single_weights(bench: Bench, layers: str) -> None:
    found = [
        bench("layers", "--model", layers, "--density", "0.5", "--directions", "forward", "--rivals", "none", *more)
        for more in ((), ("--structure", "1x1"))
    ]
    assert [row["structure"] for (row,) in found] == ["weight", "weight"]
    assert torch.equal(uniform_mask((4, 4), 0.5, structure="1x1"), uniform_mask((4, 4), 0.5))


def test_rows_of_tokens_count(bench: Bench, layers: str) -> None:
    (row,) = bench(
        "layers", "--model", layers, "--kinds", "linear", "--batch", "8", "--density", "0.5", "--directions", "forward",
        "--rivals", "none",
    )  # fmt: skip
    assert (row["batch"], row["case"]["image"]) == (8, [1, 5])
    assert row["dense_flop"] == 2 * 8 * 5 * 16 * 24


def test_steps_of_block_masks(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(
        "step", "--model", "lenet5", "--structure", "4x1", "--sparsity", "0.9", "--batch", "8", "--no-compile",
        "--rivals", "dense",
    )  # fmt: skip
    assert bench_rows.check(row) == ""
    assert (row["structure"], row["results"]["ours"]["status"]) == ("4x1", "ok")
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("model "))
    ours = next(line for line in lines if line.startswith("lenet5 "))
    assert ours[head.index("structure") :].split()[0] == "4x1"


def test_masks_of_a_network_are_of_the_structure() -> None:
    task, _ = task_of("lenet5", "magnitude", 0.8, 1, structure="2x2-taps")
    for mask in task.masks.values():
        check(mask, parse("2x2-taps"))
    assert task.network.conv1.weight.count_nonzero() == task.masks["conv1"].sum()


def test_profiles_name_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "mlp", "--structure", "4x4", "--sparsity", "0.9", "--batch", "4")
    rows = bench("step", "--profile", *arguments)
    assert {row["structure"] for row in rows} == {"4x4"}
    assert "mlp, uniform 90 %, structure 4x4, batch 4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_transformer_trains_with_every_contender(bench: Bench) -> None:
    (row,) = bench("step", "--model", "vit-tiny", "--sparsity", "0.95", "--batch", "2", "--no-compile")
    assert row["results"]["ours"]["status"] == row["results"]["dense"]["status"] == "ok"
    if installed():
        assert row["results"]["sparseprop"]["status"] == "ok"


@pytest.mark.skipif(not installed(), reason="sparseprop is not installed")
def test_sparseprop_leaves_dense_what_it_cannot_compute() -> None:
    assert unsupported(LayerCase("patches", "conv2d", 3, 64, (4, 4), (4, 4), image=(32, 32))) == (
        "has strides 1 and 2 only"
    )
    task, _ = task_of("vit-tiny", "uniform", 0.98, 2)
    trainer = CONTENDERS["sparseprop"](task, False)["swap_modules_with_sparse"]()
    assert isinstance(trainer, Trainer)
    assert type(trainer.parameters_of.patches) is torch.nn.Conv2d
    assert not trainer.masked
    assert masked_losses(task).problem([float(trainer.step())] * 3, trainer.masked) == ""


@pytest.mark.parametrize("command", ["layers", "step"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--structure", "0x4"], "--structure: got '0x4', expected 'weight', a block such as"),
        (["--structure", "blocks"], "--structure: got 'blocks'"),
    ],
)
def test_mistakes_are_one_line(
    command: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", command, *arguments]) == cli.ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--structure", "16x1024"], "--structure 16x1024: the block is larger than every layer that is measured"),
        (["--structure", "2:4"], "--structure 2:4: got a density of 0.1, its masks keep 0.5"),
        (["--model", "transformer", "--mask", "erk"], "--mask erk: needs a network, and transformer is a list"),
        (["--model", "mlp", "--structure", "16x1", "--mask", "erk", "--density", "1e-5"], "--mask erk: sparsity"),
        (["--model", "transformer"], "--layers: no layer of transformer matches"),
    ],
)
def test_mistakes_with_layers(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "layers", *arguments]) == cli.ERROR
    assert words in capsys.readouterr().err
