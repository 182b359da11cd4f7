# SPDX-License-Identifier: Apache-2.0
"""The machine's rates, the bound that is made of them, and how `fedpai bench layers --roofline` shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedpai_kernels
from fedpai.bench import machine as bench_machine
from fedpai.bench.cases import LayerCase, to_csv
from fedpai.bench.machine import MachineModel, measure_machine
from fedpai.bench.masks import uniform_mask
from fedpai.bench.rivals import CONTENDERS, Problem
from fedpai.bench.roofline_text import roofline_tables, share, summary_table
from fedpai.bench.table import bar
from fedpai.bench.work import Work, passes_of, work_of
from fedpai_kernels import _C

Bench = Callable[..., list[dict[str, Any]]]

MODEL = MachineModel(
    100.0, ((1 << 14, 60.0), (1 << 18, 50.0)), (1.2, 1.1), ((1 << 20, 40.0), (1 << 24, 10.0))
)
CASE = LayerCase("same", "conv2d", 16, 16, (3, 3), (1, 1), (1, 1), image=(16, 16))


# ---- the bound ------------------------------------------------------------------------------------------


def test_bound_is_the_slower_of_loads_and_memory() -> None:
    loads = MODEL.bound(Work(50_000_000_000, 0, 4))
    assert (loads.by, loads.seconds) == ("loads", pytest.approx(1.2 * 50 / 60))
    assert MODEL.bound(Work(60_000_000_000, 0, 4, 0, 60_000_000_000)).seconds == pytest.approx(1.1)
    for size, rate in ((1 << 10, 40e9), (1 << 20, 40e9), (1 << 23, 40e9), (1 << 25, 10e9)):
        memory = MODEL.bound(Work(0, 0, size))
        assert (memory.by, memory.seconds) == ("memory", pytest.approx(size / rate))
    # What is written is read before: half of it written makes half as much traffic again.
    assert MODEL.bound(Work(0, 0, 1 << 20, 1 << 19)).seconds == pytest.approx(1.5 * (1 << 20) / 40e9)


def test_passes_run_one_after_the_other() -> None:
    """So their bounds add up, whichever floor each one has, and so do their floors."""
    first, second = Work(60_000_000_000, 0, 4), Work(0, 0, 1 << 30)
    together, apart = MODEL.bound(first, second), [MODEL.bound(first), MODEL.bound(second)]
    assert together.seconds == pytest.approx(sum(bound.seconds for bound in apart))
    assert together.loads == pytest.approx(sum(bound.loads for bound in apart))
    assert together.memory == pytest.approx(sum(bound.memory for bound in apart))
    mask = uniform_mask(CASE.weight_shape, 0.3)
    passes = passes_of(CASE, mask, 2, "train")
    assert [work.weight_grad_flop > 0 for work in passes] == [False, False, True]
    assert work_of(CASE, mask, 2, "train").traffic == sum(work.traffic for work in passes)
    assert work_of(CASE, mask, 2, "backward").useful_flop == sum(work.useful_flop for work in passes[1:])


def test_output_is_read_before_it_is_written() -> None:
    mask, batch = uniform_mask(CASE.weight_shape, 0.3), 2
    x = y = 4 * batch * 16 * 16 * 16
    values = 4 * int(mask.sum())
    forward = work_of(CASE, mask, batch, "forward")
    assert (forward.bytes, forward.written, forward.traffic) == (x + y + values, y, x + 2 * y + values)
    weight_grad = work_of(CASE, mask, batch, "weight-grad")
    assert (weight_grad.written, weight_grad.traffic) == (values, x + y + 2 * values)


# ---- the rates ------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("isa", fedpai_kernels.available_isas())
def test_rates_are_measured_for_every_instruction_set(isa: str) -> None:
    before = fedpai_kernels.isa()
    fedpai_kernels.set_isa(isa)
    try:
        found = measure_machine(0.05)
    finally:
        fedpai_kernels.set_isa(before)
    loads, streams = ([rate for _, rate in rates] for rates in (found.load_gflops, found.stream))
    assert min(*loads, *streams) > 0
    assert found.fma_gflops >= loads[0]
    assert loads == sorted(loads, reverse=True)
    assert streams == sorted(streams, reverse=True)
    assert all(1 < loads < 2 for loads in found.loads_per_fma)
    sizes = [size for size, _ in found.load_gflops]
    assert sizes == sorted(set(sizes))
    assert {"fma_gflops", "load_gflops", "loads_per_fma", "stream_gbs"} == found.to_json().keys()
    for words in ("from registers", "from 16 KiB", "128 MiB"):
        assert words in str(found) or bench_machine.cache_bytes().get("L1") != 32 << 10


@pytest.mark.parametrize("wrong", [(0, 0, 0.1), (-1, 1, 0.1), (0, 1, 0.0), (0, 1, float("nan"))])
def test_rates_of_nothing_are_refused(wrong: tuple[int, int, float]) -> None:
    for rate in (_C.fma_rate, _C.stream_rate):
        with pytest.raises(ValueError, match="expected"):
            rate(*wrong)


@pytest.mark.alone
@pytest.mark.parametrize("direction", ["forward", "input-grad", "weight-grad"])
def test_the_bound_is_not_beaten(direction: str) -> None:
    """By more than what measuring is uncertain by; a machine whose speed changes gets several chances."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mask = uniform_mask(CASE.weight_shape, 0.3)
    problem = Problem.make(CASE, 64, mask)
    (contender,) = CONTENDERS["ours"](problem)
    call, shares = contender.calls[direction], []
    try:
        for _ in range(5):
            times = []
            for _ in range(10):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            bound = measure_machine(0.1).bound(*passes_of(CASE, mask, 64, direction)).seconds
            shares.append(bound / min(times))
            if shares[-1] < 1.1:
                break
    finally:
        torch.set_num_threads(threads)
    assert min(shares) < 1.1, shares


# ---- the table ------------------------------------------------------------------------------------------


def test_command(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.csv"
    path.write_text(to_csv([CASE, LayerCase("point", "conv2d", 4, 6, image=(6, 6), count=3)]))
    options = ("--model", str(path), "--density", "0.5,0.1", "--batch", "8", "--rivals", "none")
    rows = bench("layers", *options, "--roofline")
    printed = capsys.readouterr().out
    for words in ("share of the roofline's bound", "of the bound", "bound by", "median", "FLOP/byte"):
        assert words in printed
    for row in rows:
        roofline = row["roofline"]
        assert row["bound_ms"] <= roofline["loads_ms"] + roofline["memory_ms"] + 1e-6
        assert row["bound_ms"] >= max(roofline["loads_ms"], roofline["memory_ms"]) - 1e-6
        assert roofline["by"] == ("loads" if roofline["loads_ms"] >= roofline["memory_ms"] else "memory")
        assert roofline["traffic_bytes"] > 0
        ours = row["results"]["ours"]["variants"]["sparse"]["median_ms"]
        assert share(row) == pytest.approx(row["bound_ms"] / ours)
    assert rows[0]["machine_model"]["stream_gbs"] == {str(1 << 20): 40.0, str(1 << 24): 10.0}
    bench("layers", *options)
    assert "roofline" not in capsys.readouterr().out


def test_median_over_the_layers() -> None:
    def row(layer: str, bound: float, **changes: Any) -> dict[str, Any]:
        times = {"status": "ok", "best": "sparse", "variants": {"sparse": {"median_ms": 1.0}}}
        found = {
            "model": "tiny", "mask": "uniform", "layer": layer, "label": "3x3", "direction": "train",
            "target_density": 0.1, "density": 0.1, "count": 1, "bound_ms": bound, "useful_flop": 1000,
            "roofline": {"loads_ms": bound, "memory_ms": 0.0, "by": "loads", "traffic_bytes": 100},
            "results": {"ours": times},
        }  # fmt: skip
        return {**found, **changes}

    rows = [row("a", 0.1), row("b", 0.4, count=4), row("c", 0.6)]
    rows.append(row("d", 0.5, results={"ours": {"status": "wrong", "reason": "by a half"}}))
    (cells,) = summary_table(rows).rows
    assert cells[:4] == ["tiny", "0.1", "train", "3"]
    assert cells[5:] == ["40 %", "10 %", "60 %", "38 %", "3", "0"]
    (table,) = roofline_tables(rows)
    assert [line[5] for line in table.rows] == ["10 %", "40 %", "60 %", "-"]
    earlier = row("e", 0.1)
    del earlier["roofline"]  # rows of an earlier version have the bound alone
    assert roofline_tables([earlier]) == []
    assert summary_table([earlier]).rows == []


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, "····"), (0.5, "██··"), (1.0, "████"), (1.3, "████+"), (-0.1, "····")]
)
def test_bars(value: float, expected: str) -> None:
    assert bar(value, 4) == expected
