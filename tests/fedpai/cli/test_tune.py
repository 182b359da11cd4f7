# SPDX-License-Identifier: Apache-2.0
"""`fedpai tune` and `fedpai tune --check`, on layers that take no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpai import cli
from fedpai.bench.regret import LayerRegret, Regret
from fedpai_kernels import tuning
from fedpai_kernels.tuning import measure

FEW = ("--seconds", "0.01", "--threads", "1")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_threads: Callable[[int], None]) -> None:
    conv, linear = measure._Conv(2, 4, 4, 4), measure._Linear(2, 8, 4)
    cases = {"conv2d": conv, "strided": conv, "pointwise": conv, "linear": linear}
    cases |= {"blocks": conv, "linear_blocks": linear}
    monkeypatch.setattr(measure, "_MASKED", {name: ((case,), (0.5, 1.0)) for name, case in cases.items()})
    monkeypatch.setattr(measure, "_FULL", (conv,))
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    monkeypatch.delenv("FEDPAI_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_measures_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *FEW, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    path = tuning.default_path()
    assert f"written to {path}; holds for cpu " in printed
    assert "threads 1" in printed
    for name, density in tuning.BUILT_IN.densities().items():
        assert f"{name} " in printed
        assert f"(built in: {density:.2f})" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["break_even"] == pytest.approx(tuning.break_evens().densities(), abs=1e-4)
    assert found["machine"] == tuning.facts()


def test_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *FEW, "--out", str(tmp_path / "mine.json")]) == 0
    assert f"written to {tmp_path / 'mine.json'}" in capsys.readouterr().out
    assert tuning.state().kind == "built in"
    assert tuning.read(tmp_path / "mine.json").source == "measured on this machine"


def test_check_lists_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tune", "--check", "--model", "lenet5", "--mask", "uniform", "--sparsity", "0.5", "--batch", "4")
    assert cli.main([*words, *FEW, "--json", str(tmp_path / "regret.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "regret.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "fc1", "fc2", "classifier"]
    assert [layer["chosen"] for layer in found["layers"]] == ["sparse", "sparse", "dense", "dense", "dense"]
    for layer in found["layers"]:
        assert layer["name"] in printed
        assert min(layer["chosen_ms"], layer["other_ms"]) > 0
        assert layer["lost_ms"] == max(0.0, layer["chosen_ms"] - layer["other_ms"])
        assert layer["density"] == pytest.approx(0.5, abs=0.01)
    assert (found["threads"], found["batch"]) == (1, 4)
    assert found["figures"].startswith("built in: ")
    assert f"regret: {100 * found['regret']:.1f} % of the best choices' time" in printed
    assert not tuning.default_path().exists()


def test_regret_is_what_the_best_choices_would_save() -> None:
    layers = [
        LayerRegret("a", "a", 0.1, "sparse", "", 4.0, 6.0),
        LayerRegret("b", "b", 0.9, "sparse", "", 5.0, 2.0),
        LayerRegret("c", "c", 0.9, "dense", "", 4.0, 4.0),
    ]
    assert [layer.lost_ms for layer in layers] == [0.0, 3.0, 0.0]
    assert Regret({}, layers).share == pytest.approx(3.0 / 10.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seconds", "0"), "--seconds: expected more than 0, got 0"),
        (("--check", "--out", "a.json"), "--out: --check writes no figures"),
        (("--check", "--model", "lenet6"), "unknown model 'lenet6'"),
        (("--check", "--mask", "grapes"), "unknown kind 'grapes'"),
        (("--check", "--sparsity", "1"), "--sparsity: got 1, expected at least 0 and less than 1"),
        (("--out", "/dev/null/tuning.json"), "cannot write"),
        (("--json", "/dev/null/found.json"), "cannot write"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = () if "--seconds" in words else FEW
    assert cli.main(["tune", *seconds, *words]) == cli.ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fedpai: ")
    assert message in line


def test_nothing_is_measured_where_nobody_would_read_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDPAI_TUNING", "off")
    assert cli.main(["tune", *FEW]) == cli.ERROR
    assert "FEDPAI_TUNING is 'off'" in capsys.readouterr().err
