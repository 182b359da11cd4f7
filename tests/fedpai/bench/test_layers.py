# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench layers` on tiny layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpai import cli
from fedpai.bench import rows as bench_rows
from fedpai.bench.cases import LayerCase, to_csv
from fedpai.bench.rivals import CONTENDERS, RIVALS, Contender, Problem
from fedpai.bench.rivals.sparseprop import installed

Bench = Callable[..., list[dict[str, Any]]]

SQUARE = LayerCase("square", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), image=(6, 6), count=2)
POINT = LayerCase("point", "conv2d", 4, 6, (1, 1), (2, 2), image=(6, 6))
GROUPED = LayerCase("grouped", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), groups=2, image=(6, 6))
LINEAR = LayerCase("linear", "linear", 12, 5)
TOKENS = LayerCase("tokens", "linear", 12, 5, image=(1, 3))


@pytest.fixture
def layers(tmp_path: Path) -> str:
    path = tmp_path / "tiny.csv"
    path.write_text(to_csv([SQUARE, POINT, GROUPED, LINEAR]))
    return str(path)


def test_rows_and_table(bench: Bench, layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(
        "layers", "--model", layers, "--density", "0.5,0.2", "--batch", "8", "--kinds", "conv2d,linear"
    )
    assert [bench_rows.check(row) for row in found] == [""] * len(found)
    assert {(row["layer"], row["target_density"], row["direction"]) for row in found} == {
        (layer, density, direction)
        for layer in ("square", "point", "grouped", "linear")
        for density in (0.5, 0.2)
        for direction in ("forward", "input-grad", "weight-grad", "train")
    }
    assert len(found) == 32
    for row in found:
        assert row["model"] == "tiny"
        assert row["threads"] == 1
        assert row["results"]["ours"]["status"] == "ok"
        assert set(row["results"]["dense"]["variants"]) <= {"contiguous", "channels_last"}
        assert row["results"]["torch.sparse"]["status"] == (
            "ok" if row["layer"] in ("point", "linear") else "unavailable"
        )
        best = {name: bench_rows.median_ms(row, name) for name in row["speedup"]}
        ours = bench_rows.median_ms(row, "ours")
        assert ours
        assert row["speedup"] == pytest.approx({n: t / ours for n, t in best.items() if t}, abs=1e-3)
    printed = capsys.readouterr().out
    for words in ("tiny, uniform masks, batch 8", "4-6 3x3 @6", "4-6 1x1/2 @6", "12-5 linear", "100 GFLOP/s"):
        assert words in printed


@pytest.mark.skipif(not installed(), reason="sparseprop is not installed")
def test_sparseprop_is_wrong_for_a_batch_that_is_no_multiple_of_8(bench: Bench, layers: str) -> None:
    """Over the batch; the other variant counts then, and the row says why."""
    (row,) = bench(
        "layers",
        "--model",
        layers,
        "--density",
        "0.5",
        "--batch",
        "4",
        "--layers",
        "square",
        "--directions",
        "train",
    )
    result = row["results"]["sparseprop"]
    assert set(result["variants"]) == {"over width"}
    assert result["reason"].startswith("over batch: wrong by")


@pytest.mark.skipif(not installed(), reason="sparseprop is not installed")
def test_sparseprop_has_two_variants_and_no_lone_gradients(bench: Bench, layers: str) -> None:
    found = bench(
        "layers", "--model", layers, "--density", "0.5", "--batch", "8", "--layers", "square,grouped"
    )
    for row in found:
        result = row["results"]["sparseprop"]
        if row["layer"] == "grouped":
            assert result == {"status": "unavailable", "reason": "has no groups"}
        elif row["direction"] in ("forward", "train"):
            assert set(result["variants"]) == {"over batch", "over width"}
        else:
            assert result["reason"] == "computes both gradients in one sweep only"


def test_absent_sparseprop_is_said(
    bench: Bench, layers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedpai.bench.rivals.sparseprop.installed", lambda: False)
    (row,) = bench(
        "layers", "--model", layers, "--density", "0.5", "--layers", "square", "--directions", "train"
    )
    assert row["results"]["sparseprop"] == {"status": "unavailable", "reason": "not installed"}
    assert "sparseprop" not in row["speedup"]
    assert "sparseprop unavailable: not installed" in capsys.readouterr().out


def test_wrong_rival_is_reported_and_not_timed(
    bench: Bench, layers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_one(problem: Problem) -> list[Contender]:
        def apply(x: Tensor, weight: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x.roll(1, -1), weight, padding=1)

        return [Contender("rolled", apply, problem.x, problem.weight, problem.dy, packed=problem.plan.pack)]

    monkeypatch.setitem(CONTENDERS, "dense", off_by_one)
    (row,) = bench(
        "layers", "--model", layers, "--density", "0.5", "--layers", "square", "--directions", "train",
        "--rivals", "dense", "--batch", "8",
    )  # fmt: skip
    assert row["results"]["dense"]["status"] == "wrong"
    assert row["results"]["dense"]["reason"].startswith("rolled: wrong by")
    assert row["speedup"] == {}
    assert "WRONG" in capsys.readouterr().out


def test_criterion_measures_each_layer_with_its_own_density(bench: Bench) -> None:
    found = bench(
        "layers", "--model", "lenet5", "--mask", "erk", "--density", "0.1", "--batch", "2",
        "--kinds", "conv2d,linear", "--directions", "forward", "--rivals", "none",
    )  # fmt: skip
    assert [row["layer"] for row in found] == ["conv1", "conv2", "fc1", "fc2", "classifier"]
    assert len({row["density"] for row in found}) > 1
    kept = sum(row["nnz"] for row in found)
    total = sum(round(row["nnz"] / row["density"]) for row in found)
    assert kept / total == pytest.approx(0.1, abs=1e-3)
    assert {row["mask"] for row in found} == {"erk"}


def test_cold_caches(bench: Bench, layers: str) -> None:
    (row,) = bench(
        "layers", "--model", layers, "--density", "0.5", "--layers", "point", "--directions", "forward",
        "--rivals", "none", "--cold",
    )  # fmt: skip
    assert row["caches"] == "cold"
    assert row["results"]["ours"]["variants"]["sparse"]["inner"] == 1


@pytest.mark.parametrize("case", [SQUARE, POINT, GROUPED, LINEAR, TOKENS], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["ours", *RIVALS])
def test_contenders_agree_with_the_reference(name: str, case: LayerCase) -> None:
    """Also those that the command would refuse, were they wrong."""
    from fedpai.bench.rivals import Unavailable

    problem = Problem.make(case, 8, 0.3)
    try:
        contenders = CONTENDERS[name](problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for contender in contenders:
        assert contender.error(problem) < 1e-5, contender.variant
        gradients = [contender.calls[d]() for d in ("input-grad", "weight-grad") if d in contender.calls]
        assert all(torch.isfinite(gradient).all() for (gradient,) in gradients)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet19"], "resnet19"),
        (["--model", "nowhere.csv"], "cannot read nowhere.csv"),
        (["--mask", "erkk"], "--mask: unknown kind 'erkk', expected one of erk,"),
        (
            ["--rivals", "dense,mkl"],
            "--rivals: unknown name 'mkl', expected one of dense, sparseprop, torch.sparse,",
        ),
        (["--directions", "sideways"], "--directions: unknown name 'sideways'"),
        (["--kinds", "conv3d"], "--kinds: unknown name 'conv3d'"),
        (["--layers", "no-such-layer"], "--layers: no layer of resnet18 matches"),
        (["--json", "no/such/folder/rows.jsonl"], "--json: cannot write"),
        (["--threads", "100000"], "--threads must be at most 1024, got 100000"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError("the mistake is to be found before anything is measured")

    monkeypatch.setattr("fedpai.bench.machine.measure_machine", refuse)
    assert cli.main(["bench", "layers", *arguments]) == cli.ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "0"], "above 0 and at most 1"),
        (["--density", "few"], "above 0 and at most 1"),
        (["--samples", "0"], "at least 1"),
        (["--batch", "x"], "at least 1"),
    ],
)
def test_bad_numbers_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "layers", *arguments])
    assert stop.value.code == cli.ERROR
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
