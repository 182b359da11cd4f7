# SPDX-License-Identifier: Apache-2.0
"""Taking turns, and quantiles."""

from __future__ import annotations

import gc
import time

import pytest

from fedpai.bench.timing import Effort, interleave, summarise


def test_everybody_has_a_turn_in_each_round() -> None:
    calls: list[str] = []
    timings = interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"}, Effort(20, min_time=0.0)
    )
    assert {timing.samples for timing in timings.values()} == {20}
    measured = "".join(calls[6:])  # two calls of each come before
    rounds = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert gc.isenabled()


@pytest.mark.alone
def test_short_calls_are_repeated_within_a_sample() -> None:
    timing = interleave({"sleep": lambda: time.sleep(0.001)}, Effort(3, min_time=0.01))["sleep"]
    assert 3 <= timing.inner <= 10
    assert 0.001 <= timing.best <= timing.q20 <= timing.median <= timing.q80


@pytest.mark.alone
def test_slow_calls_stop_at_their_budget() -> None:
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timings = interleave(calls, Effort(10, min_time=0.0, budget=0.01, least=3))
    assert timings["slow"].samples == 3
    assert timings["fast"].samples == 10


@pytest.mark.alone
def test_hopeless_variants_stop_and_slow_contenders_do_not() -> None:
    calls = {("a", "good"): 0.001, ("a", "bad"): 0.01, ("b", "only"): 0.01}
    timings = interleave(
        {name: lambda pause=pause: time.sleep(pause) for name, pause in calls.items()},
        Effort(5, min_time=0.0, least=2),
        lambda name: name[0],
    )
    assert {name: timing.samples for name, timing in timings.items()} == {
        ("a", "good"): 5, ("a", "bad"): 2, ("b", "only"): 5
    }  # fmt: skip


def test_before_each_sample() -> None:
    calls: list[str] = []
    effort = Effort(4, before_each=lambda: calls.append("before"))
    timing = interleave({"call": lambda: calls.append("call")}, effort)["call"]
    assert calls == ["call", "call", *["before", "call"] * 4]
    assert timing.inner == 1


def test_quantiles() -> None:
    timing = summarise([0.004, 0.001, 0.003, 0.002, 0.005, 0.006], 7)
    assert (timing.best, timing.q20, timing.median, timing.q80) == pytest.approx(
        (0.001, 0.002, 0.0035, 0.005)
    )
    assert timing.to_json() == {
        "median_ms": 3.5, "q20_ms": 2.0, "q80_ms": 5.0, "best_ms": 1.0, "samples": 6, "inner": 7
    }  # fmt: skip
