# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench aggregate` on small networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedpai_kernels
from fedpai import cli
from fedpai.bench import aggregate_rivals
from fedpai.bench import rows as bench_rows

Bench = Callable[..., list[dict[str, Any]]]
CHANGED_FOR_THE_PROCESS = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
)
"""By measurements on a GPU."""


@pytest.mark.parametrize("mask", ["uniform", "erk"])
def test_rows_and_table(bench: Bench, capsys: pytest.CaptureFixture[str], mask: str) -> None:
    found = bench("aggregate", "--model", "lenet5", "--mask", mask, "--clients", "5", "--distinct", "2")
    assert [row["form"] for row in found] == ["shared", "personal"]
    for row in found:
        assert bench_rows.check(row) == ""
        assert row["density"] == pytest.approx(0.02, abs=1e-3)
        assert set(row["results"]) == {"ours", "compensated", "state_dict"}
        assert set(row["results"]["state_dict"]["variants"]) == {"multiply", "in place"}
        assert "device" not in row
        assert row["caches"] == "as the others leave them"
        assert row["speedup"]["state_dict"] > 0
        assert row["copy_share"] > 0
        assert row["copy"]["bytes"] == 8 * row["values"]
    shared, personal = found
    others = shared["values"] // 5 - shared["union"]
    assert shared["bytes"] == 4 * 6 * (shared["union"] + others)
    assert shared["union"] < personal["union"] <= 5 * shared["union"]
    assert personal["bytes"] == 8 * (personal["values"] + personal["union"] + others)
    printed = capsys.readouterr().out
    for words in ("merging 5 clients", f"{mask} 98 %", "of the bandwidth of the copy", "2 state_dicts take turns"):
        assert words in printed


def test_a_rival_that_merges_wrongly_does_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(clients: Any) -> Any:
        return {key: 2 * tensor for key, tensor in aggregate_rivals.mean_multiply(clients).items()}

    monkeypatch.setattr(aggregate_rivals, "mean_in_place", late)
    (row,) = bench("aggregate", "--model", "lenet5", "--clients", "3", "--form", "shared")
    assert set(row["results"]["state_dict"]["variants"]) == {"multiply"}
    assert "in place: differs from ours by up to" in row["results"]["state_dict"]["reason"]
    assert row["distinct"] == 3


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_copies_copy_everything(threads: int | None) -> None:
    source, dest = torch.arange(1001, dtype=torch.float32), torch.empty(1001)
    found = aggregate_rivals.copies(source, dest, threads)
    assert set(found) == ({"torch"} if threads is None else {"torch", "memmove"})
    for copy in found.values():
        dest.zero_()
        copy()
        assert torch.equal(dest, source)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--form", "both"], "--form: unknown name 'both', expected one of shared, personal"),
        (["--model", "nope"], "--model: "),
        (["--mask", "nope"], "--mask: unknown kind 'nope'"),
        (["--sparsity", "1"], "--sparsity: got 1, expected less than 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "aggregate", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert text in line


@pytest.mark.gpu
@pytest.mark.skipif(not fedpai_kernels.cuda.is_available(), reason="no GPU, or no libfedpai_cuda.so")
@pytest.mark.parametrize("caches", ["cold", "as the others leave them"])
def test_on_a_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch, caches: str) -> None:
    for owner, name in CHANGED_FOR_THE_PROCESS:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it is, and so again after the test
    options = ("--device", "cuda", "--clients", "5", "--distinct", "2", *(["--cold"] if caches == "cold" else []))
    found = bench("aggregate", "--model", "lenet5", *options)
    assert [row["form"] for row in found] == ["shared", "personal"]
    for row in found:
        assert bench_rows.check(row) == ""
        assert (row["device"]["name"], row["caches"]) == (torch.cuda.get_device_name(), caches)
        assert {result["status"] for result in row["results"].values()} == {"ok"}
        assert set(row["results"]["state_dict"]["variants"]) == {"multiply", "in place"}
        assert row["speedup"]["state_dict"] > 0
        assert row["copy_share"] > 0
