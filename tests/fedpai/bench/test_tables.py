# SPDX-License-Identifier: Apache-2.0
"""Result rows and the tables made of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from fedpai.bench import BenchError
from fedpai.bench.rows import append, check, check_writable, geometric_mean, read
from fedpai.bench.table import Table, digits, milliseconds, ratio


def numbers(median: float) -> dict[str, float]:
    return {
        "median_ms": median, "q20_ms": median * 0.9, "q80_ms": median * 1.1, "best_ms": median * 0.8,
        "samples": 5, "inner": 1,
    }  # fmt: skip


def common(kind: str) -> dict[str, Any]:
    return {
        "schema": 1, "row": kind, "time": "2026-01-02T03:04:05+00:00", "commit": "abc",
        "machine": {"cpu": "Some CPU"}, "software": {"torch": "2.13.0", "sparseprop": None}, "threads": 2,
        "isa": "avx2", "machine_model": {}, "model": "resnet18", "mask": "uniform", "density": 0.02, "batch": 64,
    }  # fmt: skip


def step_row(**changes: Any) -> dict[str, Any]:
    row = {
        **common("step"), "sparsity": 0.98, "mac_share": 0.02, "input": [3, 32, 32], "mask_data": None, "losses": {},
        "layers": {"sparse": 21},
        "results": {
            "ours": {"status": "ok", "best": "sparsify_", "variants": {"sparsify_": numbers(128.0)}},
            "dense": {"status": "ok", "best": "b", "variants": {"a": numbers(1600.0), "b": numbers(1280.0)}},
            "sparseprop": {"status": "unavailable", "reason": "not installed"},
        },
        "speedup": {"dense": 10.0},
    }  # fmt: skip
    return {**row, **changes}


def layer_row(**changes: Any) -> dict[str, Any]:
    row = {
        **common("layer"), "layer": "conv1", "label": "3-64 3x3 @32", "count": 1, "case": {}, "target_density": 0.02,
        "nnz": 35, "direction": "train", "caches": "as the others leave them", "useful_flop": 2_000_000,
        "dense_flop": 100_000_000, "bound_ms": 0.5, "choice": "sparse", "setup": {},
        "results": {
            "ours": {"status": "ok", "best": "sparse", "variants": {"sparse": numbers(2.0)}},
            "dense": {"status": "ok", "best": "contiguous", "variants": {"contiguous": numbers(8.0)}},
            "sparseprop": {"status": "wrong", "reason": "over batch: wrong by 1"},
        },
        "speedup": {"dense": 4.0},
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for path in tables.documents(tmp_path):
        path.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    return tmp_path


def render(root: Path, *rows: dict[str, Any], options: tuple[str, ...] = ()) -> int:
    for row in rows:
        append(root / "results" / "rows.jsonl", row)
    return tables.main(["--results", str(root / "results"), "--root", str(root), *options])


def profile_row(**changes: Any) -> dict[str, Any]:
    row = {
        **common("profile"), "sparsity": 0.98, "mac_share": 0.02, "input": [3, 32, 32], "mask_data": None, "step": {},
        "part": "loss", "layer": None, "counted": "operation", "median_ms": 1.0, "q20_ms": 0.9, "q80_ms": 1.1,
        "share": 0.01,
    }  # fmt: skip
    return {**row, **changes}


def memory_row(**changes: Any) -> dict[str, Any]:
    row = {
        **common("memory"), "sparsity": 0.98, "mac_share": 0.02, "input": [3, 32, 32], "mask_data": None, "steps": 5,
        "method": "VmHWM", "peaks": {"ours": {"sparsify_": {"start_bytes": 1, "peak_bytes": 2}}},
    }  # fmt: skip
    return {**row, **changes}


def test_documents_of_this_repository_are_up_to_date() -> None:
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"


def test_profiles_are_in_no_table(root: Path) -> None:
    """Nor do they bring a machine into the documents that measured nothing else."""
    assert check(profile_row()) == ""
    assert check(profile_row(part="loss") | {"schema": 2}) != ""
    missing = profile_row()
    del missing["counted"]
    assert "counted" in check(missing)
    render(root, step_row())
    before = [path.read_text() for path in tables.documents(root)]
    render(root, profile_row(threads=7))
    assert [path.read_text() for path in tables.documents(root)] == before


def test_memory_is_in_no_table(root: Path) -> None:
    assert check(memory_row()) == ""
    assert "ours, sparsify_: no bytes" in check(memory_row(peaks={"ours": {"sparsify_": {"peak_bytes": 0}}}))
    render(root, step_row())
    before = [path.read_text() for path in tables.documents(root)]
    assert render(root, memory_row(threads=7)) == 0
    assert [path.read_text() for path in tables.documents(root)] == before


def test_tables_in_documents(root: Path) -> None:
    second = layer_row(layer="layer1.0.conv1", label="64-64 3x3 @32", speedup={"dense": 9.0})
    forward = layer_row(direction="forward", speedup={"dense": 100.0})
    assert render(root, step_row(), layer_row(), second, forward) == 0
    readme, docs = (path.read_text() for path in tables.documents(root))
    for text in (readme, docs):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert "Some CPU, 2 threads, avx2, torch 2.13.0, SparseProp absent, batch 64, 2026-01-02" in text
        assert "| resnet18 | uniform 98 % | weight | 2.0 % | 20.0 | - | 2.00 | 10x | - |" in text
    assert "| resnet18 | uniform | weight | 2 % | 2 | 6.0x | 4.0x | - | - |" in docs
    assert "| conv1 | 3-64 3x3 @32 | weight | 0.02 | 2.00 | 8.00 | - | 4.0x | - | 0.500 | 1.00 | 50.0 |" in docs
    assert "3-64 3x3" not in readme


def test_structures_are_different_measurements(root: Path) -> None:
    """A row of before there were any is of single weights."""
    blocks = step_row(structure="16x1", speedup={"dense": 13.0})
    render(root, step_row(speedup={"dense": 11.0}), blocks, step_row(structure="weight", time="2026-02-01T00:00:00"))
    step_layers = [layer_row(), layer_row(structure="8x8", structure_found="8x4", speedup={"dense": 5.0})]
    render(root, *step_layers)
    readme, docs = (path.read_text() for path in tables.documents(root))
    assert "| resnet18 | uniform 98 % | weight | 2.0 % | 20.0 | - | 2.00 | 10x | - |" in readme
    assert "11x" not in readme
    assert "| resnet18 | uniform 98 % | 16x1 | 2.0 % | 20.0 | - | 2.00 | 13x | - |" in docs
    assert "16x1" not in readme, "the first screen is of single weights"
    assert "| resnet18 | uniform | 8x8 | 2 % | 1 | 5.0x | 5.0x | - | - |" in docs
    assert "| resnet18 | uniform | weight | 2 % | 1 | 4.0x | 4.0x | - | - |" in docs
    assert "| conv1 | 3-64 3x3 @32 | 8x4 | 0.02 | 2.00" in docs
    assert "| conv1 | 3-64 3x3 @32 | weight | 0.02 | 2.00" in docs


def aggregate_row(**changes: Any) -> dict[str, Any]:
    row = {
        **common("aggregate"), "batch": None, "sparsity": 0.98, "mask_data": None, "form": "shared", "clients": 100,
        "distinct": 10, "values": 1000, "union": 10, "bytes": 4040, "copy": {"bytes": 8000, "torch": numbers(1.0)},
        "copy_share": 0.77,
        "results": {
            "ours": {"status": "ok", "best": "float64", "variants": {"float64": numbers(2.0)}},
            "state_dict": {
                "status": "ok", "best": "in place",
                "variants": {"multiply": numbers(400.0), "in place": numbers(80.0)},
            },
        },
        "speedup": {"state_dict": 40.0},
    }  # fmt: skip
    return {**row, **changes}


def test_merging(root: Path) -> None:
    """Rows that do not say how caches were are of caches that were not emptied."""
    old = aggregate_row(copy_share=0.5)
    render(root, old, aggregate_row(time="2026-02-01T00:00:00+00:00", caches="as the others leave them"))
    text = tables.documents(root)[1].read_text()
    assert "SparseProp absent, 100 clients, 2026-02-01;" in text
    assert "| resnet18 | uniform 98 % | shared | 400 | 80.0 | 2.00 | 200x | 40x | 77 % |" in text
    assert "50 %" not in text


def test_rows_of_a_gpu(root: Path) -> None:
    """Apart from those of the CPU beside it, each with its size; rows of steps do not say how caches were."""
    there = {"device": {"name": "A GPU", "precision": "f32"}, "isa": "sm_90"}
    cold = aggregate_row(**there, caches="cold", copy_share=0.9)
    warm = aggregate_row(**there, caches="as the others leave them")
    assert render(root, step_row(), step_row(**there, speedup={"dense": 7.0}), aggregate_row(), cold, warm) == 0
    text = tables.documents(root)[1].read_text()
    for size in ("as the others leave them caches, torch 2.13.0, batch 64", "cold caches, torch 2.13.0, 100 clients"):
        assert f"Measured on A GPU, sm_90, f32, {size}, 2026-01-02;" in text
    assert "A GPU, sm_90, f32, as the others leave them caches, torch 2.13.0, 100 clients" in text
    assert text.count("77 %") == 2
    assert text.count("90 %") == 1


def test_newest_row_counts(root: Path) -> None:
    newer = step_row(time="2026-02-01T00:00:00+00:00", speedup={"dense": 12.0})
    other = step_row(machine={"cpu": "Other CPU"}, speedup={"dense": 3.0})
    render(root, newer, step_row(), other)
    text = tables.documents(root)[0].read_text()
    assert "12x" in text
    assert "10x" not in text
    assert "Other CPU" in text
    assert "3.0x" in text


def test_check_finds_what_is_out_of_date_and_changes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(root, step_row(), options=("--check",)) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in tables.documents(root)[0].read_text()
    assert render(root) == 0
    assert render(root, options=("--check",)) == 0


@pytest.mark.parametrize(
    "text", ["", tables.BEGIN, f"{tables.END}{tables.BEGIN}", 2 * f"{tables.BEGIN}{tables.END}"]
)
def test_missing_markers_are_said(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables.documents(root)[0].write_text(text)
    assert render(root, step_row()) == 2
    assert "README.md: expected" in capsys.readouterr().err


@pytest.mark.parametrize("make", [step_row, layer_row])
def test_rows_are_checked(make: Any, tmp_path: Path) -> None:
    row = make()
    assert check(row) == ""
    assert "missing" in check({name: value for name, value in row.items() if name != "mask"})
    assert "schema" in check({**row, "schema": 2})
    assert "schema" in check({**row, "row": "epoch"})
    assert check([row]) == "no JSON object"
    unordered = copy.deepcopy(row)
    next(iter(unordered["results"]["ours"]["variants"].values()))["q20_ms"] = 1e6
    assert "out of order" in check(unordered)
    unreasoned = {**row, "results": {"ours": {"status": "wrong"}}}
    assert "without a reason" in check(unreasoned)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n{\n")
    with pytest.raises(BenchError, match="line 2"):
        list(read([file]))
    with pytest.raises(BenchError, match="cannot read"):
        list(read([tmp_path / "absent.jsonl"]))


def test_unwritable_results_are_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--json: cannot write"):
        check_writable(tmp_path / "absent" / "rows.jsonl")


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.1234, "0.123"),
        (0.00012, "0.000120"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text
    assert milliseconds(value) == text


def test_plain_and_markdown() -> None:
    table = Table(["name", "n"], [["a", "1"], ["long", "23"]], title="title")
    assert table.to_text() == "title\nname   n\na      1\nlong  23"
    assert table.to_markdown() == "| name | n |\n| --- | ---: |\n| a | 1 |\n| long | 23 |"
    assert (ratio(None), ratio(9.96)) == ("-", "10.0x")
