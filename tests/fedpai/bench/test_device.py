# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench layers`, `step` and `aggregate` with `--device cuda`, without a GPU: timing by events, what rows
say, the errors. The device is the CPU, called by another name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedpai import cli
from fedpai.bench import device, rows
from fedpai.bench.cases import LayerCase, to_csv
from fedpai.bench.timing import Call, Effort, interleave
from fedpai_kernels.cuda import library

Bench = Callable[..., list[dict[str, Any]]]
PROPERTIES = SimpleNamespace(
    name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=1 << 20
)
LAYER = LayerCase("square", "conv2d", 4, 6, (3, 3), (1, 1), (1, 1), image=(6, 6))


class Stream:
    """A stream on which everything put there takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def put(self, what: str) -> None:
        self.log.append(what)
        self.now += 1.0

    def event(self) -> StreamEvent:
        return StreamEvent(self)


class StreamEvent:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at, self.waited = stream, -1.0, False

    def record(self) -> None:
        self.at = self.stream.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end_event: Any) -> float:
        assert end_event.waited, "asked for before the device has come there"
        return float(end_event.at - self.at)


def test_events_count_what_lies_between_them() -> None:
    """Neither what came before nor what comes after; a sample of cold calls begins behind the flush."""
    stream = Stream()
    seconds = device.event_seconds(stream.event)
    stream.put("before")
    assert seconds(lambda: stream.put("call"), 3) == pytest.approx(0.003)
    stream.put("after")
    effort = Effort(4, min_time=0.01, before_each=lambda: stream.put("flush"), seconds=seconds)
    timing = interleave({"only": lambda: stream.put("cold")}, effort)["only"]
    assert (timing.median, timing.inner) == (pytest.approx(0.001), 1)
    assert stream.log[-8:] == ["flush", "cold"] * 4
    warm = interleave({"only": lambda: stream.put("warm")}, Effort(2, min_time=0.01, seconds=seconds))["only"]
    assert (warm.median, warm.inner) == (pytest.approx(0.001), 10)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Precisions that a device was asked for; it is the CPU."""
    asked: list[str] = []

    def seconds(call: Call, times: int) -> float:
        for _ in range(times):
            call()
        return 1e-3 * times

    def cuda(precision: str = "f32") -> device.Device:
        asked.append(precision)
        return device.described(precision, torch.device("cpu"), seconds, PROPERTIES)

    monkeypatch.setattr(device, "cuda", cuda)
    return asked


@pytest.mark.parametrize("precision", ["f32", "tf32"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_rows_say_what_was_compared(
    bench: Bench, gpu: list[str], tmp_path: Path, precision: str, cold: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = tmp_path / "tiny.csv"
    layers.write_text(to_csv([LAYER]))
    found = bench(
        *("layers", "--model", str(layers), "--density", "0.5", "--batch", "8", "--device", "cuda"),
        *("--precision", precision, "--directions", "forward,train", *(["--cold"] if cold else [])),
    )
    assert gpu == [precision]
    assert [rows.check(row) for row in found] == ["", ""]
    for row in found:
        assert row["isa"] == "sm_90"
        assert row["caches"] == ("cold" if cold else "as the others leave them")
        assert (row["device"]["name"], row["device"]["precision"]) == ("A GPU", precision)
        sides = row["device"]["sides"]
        assert (sides["ours"]["tf32"], sides["dense"]["tf32"]) == (False, precision == "tf32")
        assert sides["ours"]["dtype"] == sides["dense"]["dtype"] == "float32"
        assert row["bound_ms"] is None
        assert row["machine_model"] == {}
        assert "roofline" not in row
        assert set(row["results"]) == {"ours", "dense"}
        assert rows.median_ms(row, "ours") == pytest.approx(1.0)
        assert row["speedup"] == {"dense": 1.0}
    printed = capsys.readouterr().out
    assert printed.startswith("A GPU, torch ")
    assert "GFLOP/s from registers" not in printed


def test_steps_are_timed_there(bench: Bench, gpu: list[str]) -> None:
    (row,) = bench("step", "--model", "lenet5", "--sparsity", "0.9", "--batch", "8", "--no-compile", "--device", "cuda")
    assert rows.check(row) == ""
    assert gpu == ["f32"]
    assert (row["isa"], row["device"]["name"], row["machine_model"]) == ("sm_90", "A GPU", {})
    assert set(row["results"]) == {"ours", "dense"}
    assert rows.median_ms(row, "ours") == rows.median_ms(row, "dense") == pytest.approx(1.0)


@pytest.fixture
def launched(merging_on_host: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is launched for merging; the CPU does it."""
    names: list[str] = []
    call = library.Library.call

    def logged(self: library.Library, name: str, *arguments: object) -> None:
        names.append(name)
        call(self, name, *arguments)

    monkeypatch.setattr(library.Library, "call", logged)
    return names


@pytest.mark.parametrize("caches", ["cold", "as the others leave them"])
def test_clients_are_merged_there(
    bench: Bench, gpu: list[str], launched: list[str], caches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the CUDA kernels, in one launch each; both loops give the same; what is moved is that of the CPU."""
    task = ("aggregate", "--model", "lenet5", "--clients", "5", "--distinct", "2")
    found = bench(*task, "--device", "cuda", *(["--cold"] if caches == "cold" else []))
    assert gpu == ["f32"]
    printed = capsys.readouterr().out
    assert printed.startswith("A GPU, torch ")
    assert ("caches are emptied before each sample" in printed) == (caches == "cold")
    assert "lie on the device before a call is timed" in printed
    for row, on_cpu in zip(found, bench(*task), strict=True):
        assert rows.check(row) == ""
        assert (row["isa"], row["device"]["name"], row["machine_model"]) == ("sm_90", "A GPU", {})
        assert row["caches"] == caches
        same = ("form", "values", "union", "bytes", "clients", "distinct", "density")
        assert [row[name] for name in same] == [on_cpu[name] for name in same]
        assert set(row["results"]) == {"ours", "compensated", "state_dict"}
        assert set(row["results"]["state_dict"]["variants"]) == {"multiply", "in place"}
        assert rows.median_ms(row, "ours") == pytest.approx(1.0)
        assert row["speedup"] == {"compensated": 1.0, "state_dict": 1.0}
        assert set(row["copy"]) == {"bytes", "torch"}
        assert row["copy_share"] == pytest.approx(row["bytes"] / row["copy"]["bytes"], abs=1e-4)
    # Masks are looked at before the times: once for the check of the first clients, once for the measurement.
    assert launched.count("find_segments") == 2
    assert set(launched) == {"weighted_mean", "find_segments", "masked_mean"}


def test_bfloat16_is_images_and_dense_weights() -> None:
    made = device.described("bf16", torch.device("cpu"), lambda call, times: 0.0, PROPERTIES)
    assert made.dtype == torch.bfloat16
    assert made.facts["sides"]["ours"] == {"dtype": "bfloat16", "values": "float32", "tf32": False}
    assert made.facts["sides"]["dense"]["dtype"] == "bfloat16"
    assert made.bytes_to_flush == 2 * PROPERTIES.L2_cache_size
    assert made.flusher()() is not None


def test_dense_in_bfloat16_is_within_its_tolerance() -> None:
    from fedpai.bench.rivals import Problem, dense

    problem = Problem.make(LAYER, 8, 0.5, dtype=torch.bfloat16)
    assert problem.x.dtype == torch.bfloat16
    for contender in dense.build(problem):
        assert 1e-5 < contender.error(problem) < 2e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["layers", "step", "aggregate"])
def test_a_torch_without_cuda_is_said(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", kind, "--device", "cuda"]) == 2
    assert "--device cuda: there is torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layers", "--device", "cuda", "--rivals", "dense,sparseprop"], "--rivals: sparseprop computes on the CPU"),
        (["layers", "--device", "cuda", "--roofline"], "--roofline: of the CPU's kernels"),
        (["layers", "--precision", "bf16"], "--precision bf16: for --device cuda only"),
        (["step", "--device", "cuda", "--rivals", "sparseprop"], "--rivals: sparseprop computes on the CPU"),
        (["step", "--device", "cuda", "--memory"], "--memory: of the CPU's kernels"),
        (["step", "--device", "cuda", "--activation-dtype", "bf16"], "--activation-dtype: of the CPU's kernels"),
    ],
)
def test_what_does_not_go_together(
    gpu: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err
