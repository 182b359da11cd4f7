# SPDX-License-Identifier: Apache-2.0
"""Which file of figures counts, and what is said about one that does not."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedpai_kernels as fk
from fedpai_kernels import tuning
from fedpai_kernels.tuning import BUILT_IN, BreakEvens, TuningError, file
from tests.nn.small import fingerprint, masked_model

MEASURED = BreakEvens(0.95, 0.5, 0.75, 0.125, 1.0, 0.5, 64, "measured on this machine")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and no FEDPAI_TUNING."""
    monkeypatch.delenv("FEDPAI_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------- which file


def test_without_a_file_the_built_in_figures_hold(cache: Path) -> None:
    assert tuning.break_evens() is BUILT_IN
    assert tuning.state().kind == "built in"
    assert list(cache.iterdir()) == [], "nobody asked for a folder"


def test_what_was_written_is_read(cache: Path) -> None:
    path = tuning.default_path()
    assert path.parent == cache / "fedpai"
    tuning.write(path, MEASURED, {"a layer": 1.5})
    assert tuning.break_evens() == MEASURED
    assert tuning.state() == tuning.State("measured", path, MEASURED)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"
    assert json.loads(path.read_text())["samples"] == {"a layer": 1.5}


def test_every_number_of_threads_has_a_file(cache: Path, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    tuning.write(tuning.default_path(), MEASURED, {})
    set_threads(2)
    assert tuning.break_evens() is BUILT_IN
    set_threads(1)
    assert tuning.break_evens() == MEASURED


@pytest.mark.parametrize("name", ["cpu", "isa", "torch", "kernels"])
def test_other_facts_have_other_files(cache: Path, name: str) -> None:
    assert tuning.default_path(tuning.facts() | {name: "another"}) != tuning.default_path()


def test_the_home_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tuning.default_path().parent == tmp_path / ".cache" / "fedpai"


def test_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(tuning.default_path(), MEASURED, {})
    monkeypatch.setenv("FEDPAI_TUNING", "off")
    assert tuning.break_evens() is BUILT_IN
    assert tuning.state().kind == "off"


def test_a_named_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(cache / "mine.json", MEASURED, {})
    assert tuning.break_evens() is BUILT_IN
    monkeypatch.setenv("FEDPAI_TUNING", str(cache / "mine.json"))
    assert tuning.break_evens() == MEASURED


# ------------------------------------------------------------------------------------------------- files that lie


def spoil(path: Path, how: str) -> None:
    content = json.loads(path.read_text())
    figures = content["break_even"]
    if how == "cut":
        path.write_text(path.read_text()[:100])
    elif how == "no text":
        path.write_bytes(b"\xff\xfe\x00")
    elif how == "empty":
        path.write_text("")
    elif how == "a list":
        path.write_text("[1, 2]")
    elif how == "nested":
        path.write_text("[" * 100_000)
    elif how == "format":
        changed(path, format=1)
    elif how == "a density missing":
        changed(path, break_even={"conv2d": 0.5})
    elif how == "a density too many":
        changed(path, break_even=figures | {"conv3d": 0.5})
    elif how == "above one":
        changed(path, break_even=figures | {"linear": 1.5})
    elif how == "not a number":
        path.write_text(path.read_text().replace("0.125", "NaN"))
    elif how == "text":
        changed(path, break_even=figures | {"linear": "0.5"})
    elif how == "true":
        changed(path, break_even=figures | {"linear": True})
    elif how == "fan-in":
        changed(path, full_fan_in=-1)
    elif how == "no machine":
        changed(path, machine=None)
    elif how == "another machine":
        changed(path, machine=content["machine"] | {"cpu": "Another"})
    elif how == "another torch":
        changed(path, machine=content["machine"] | {"torch": "1.0"})
    elif how == "a folder":
        path.unlink()
        path.mkdir()


PROBLEMS = {
    "cut": "is damaged",
    "no text": "is damaged",
    "empty": "is damaged",
    "a list": "has format 'list', expected 2",
    "nested": "is damaged",
    "format": "has format 1, expected 2",
    "a density missing": "is damaged (break_even: expected the numbers conv2d, strided, pointwise, linear, blocks, "
    "linear_blocks)",
    "a density too many": "is damaged (break_even: expected the numbers",
    "above one": "is damaged (break_even: linear: expected 0 to 1, got 1.5)",
    "not a number": "is damaged (break_even: linear: expected 0 to 1, got nan)",
    "text": "is damaged (break_even: linear: expected 0 to 1, got '0.5')",
    "true": "is damaged (break_even: linear: expected 0 to 1, got True)",
    "fan-in": "is damaged (full_fan_in: expected an int of at least 0, got -1)",
    "no machine": "is damaged (machine: expected an object, got None)",
    "another machine": "was measured elsewhere (cpu 'Another', here ",
    "another torch": "was measured elsewhere (torch '1.0', here ",
    "a folder": "cannot be read",
}


@pytest.mark.parametrize("how", PROBLEMS)
def test_a_file_that_cannot_be_used_is_named_and_left(cache: Path, how: str) -> None:
    path = tuning.default_path()
    tuning.write(path, MEASURED, {})
    spoil(path, how)
    with pytest.warns(UserWarning, match="the built-in break-evens hold, because") as caught:
        assert tuning.break_evens() is BUILT_IN
    assert str(path) in str(caught[0].message)
    assert PROBLEMS[how] in str(caught[0].message)
    found = tuning.state()
    assert (found.kind, found.figures) == ("unusable", BUILT_IN)
    assert PROBLEMS[how] in found.problem


@pytest.mark.parametrize("how", [*PROBLEMS, "absent"])
def test_one_that_was_asked_for_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    path = cache / "mine.json"
    tuning.write(path, MEASURED, {})
    spoil(path, how)
    if how == "absent":
        path.unlink()
    monkeypatch.setenv("FEDPAI_TUNING", str(path))
    with pytest.raises(TuningError, match=r"^FEDPAI_TUNING: ") as caught:
        tuning.break_evens()
    assert str(path) in str(caught.value)
    assert PROBLEMS.get(how, "there is no file") in str(caught.value)
    assert tuning.state().kind == "broken"
    model, masks = masked_model()
    before = fingerprint(model)
    with pytest.raises(TuningError, match="FEDPAI_TUNING"):
        fk.sparsify_(model, masks)
    assert fingerprint(model) == before


def test_a_failed_write_leaves_the_old_file(cache: Path) -> None:
    path = tuning.default_path()
    tuning.write(path, MEASURED, {})
    with pytest.raises(TypeError, match="JSON"):
        tuning.write(path, BUILT_IN, {"not JSON": object()})
    assert tuning.read(path) == MEASURED
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ----------------------------------------------------------------------------------------------------- conversions


def test_conversions_use_them_and_say_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Masks of 0.9 are computed as dense ones: by these figures, no layer goes by the sparse kernel for that.
    monkeypatch.setattr(file, "BUILT_IN", dataclasses.replace(BUILT_IN, blocks=0.8, linear_blocks=0.35))
    model, masks = masked_model()
    assert fk.sparsify(model, masks).stem.mask.equal(masks["stem"])
    report = fk.sparsify_(masked_model()[0], masks)
    assert "(built in)" in report["stem"].reason
    assert [report[name].kernel for name in masks] == ["dense", "sparse", "sparse", "dense"]

    # stem is 0.9 dense, hidden 0.1: between the built-in figures and these.
    tuning.write(tuning.default_path(), BreakEvens(0.95, 0.1, 0.1, 0.05, 0.95, 0.05, 4, "any"), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fk.sparsify_(model, masks)
    assert [report[name].kernel for name in masks] == ["sparse", "sparse", "dense", "dense"]
    assert all("(measured on this machine)" in report[name].reason for name in masks)
    assert "break-even of 0.95" in report["stem"].reason


def test_convolutions_without_a_mask_follow_the_measured_fan_in(cache: Path) -> None:
    """`plain` has 8 weights per output; the conversion decides, and torch's own module comes back."""
    for fan_in, ours in ((8, True), (7, False)):
        tuning.write(tuning.default_path(), BreakEvens(0.8, 0.8, 0.8, 0.3, 1.0, 0.5, fan_in, "any"), {})
        model, masks = masked_model()
        before = set(model.plain.__dict__)
        fk.sparsify_(model, masks)
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
        assert model.plain._is_ours(x) is ours
        (cache / "fedpai" / tuning.default_path().name).unlink()
        assert model.plain._is_ours(x) is ours, "decided by the conversion, not by what is there later"
        fk.densify_(model)
        assert set(model.plain.__dict__) == before
