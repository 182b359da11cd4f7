# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: contenders take turns, sample by sample, so that a machine that changes speed changes
all of them.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Call = Callable[[], object]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        samples: of each contender.
        min_time: seconds a sample lasts at least; a short call is repeated within it.
        budget: seconds after which a contender gets no more samples, once it has `least`.
        least: samples that even the slowest contender gets.
        hopeless: a variant whose fastest sample is so many times slower than that of the best variant of its
            contender gets no more than `least`: it cannot count.
        before_each: called before every sample, outside of its time (to empty caches); then a sample is one
            call.
        seconds: times so many calls; by default as a clock on the wall does.
    """

    samples: int = 30
    min_time: float = 0.002
    budget: float = 10.0
    least: int = 3
    hopeless: float = 2.5
    before_each: Call | None = None
    seconds: Callable[[Call, int], float] = field(default_factory=lambda: wall_seconds)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quantiles over the samples.

    Attributes:
        median, q20, q80: seconds.
        best: the shortest; what is left when other work on the machine disturbs the rest.
        samples: how many.
        inner: calls in each.
    """

    median: float
    q20: float
    q80: float
    best: float
    samples: int
    inner: int

    def to_json(self) -> dict[str, float | int]:
        """Milliseconds, rounded to a nanosecond."""
        return {
            "median_ms": round(1e3 * self.median, 6),
            "q20_ms": round(1e3 * self.q20, 6),
            "q80_ms": round(1e3 * self.q80, 6),
            "best_ms": round(1e3 * self.best, 6),
            "samples": self.samples,
            "inner": self.inner,
        }


def interleave(
    calls: Mapping[Key, Call], effort: Effort, contender_of: Callable[[Key], object] = lambda key: key
) -> dict[Key, Timing]:
    """Times each call; one sample of each per round, in a new order each round.

    The order is random (from a fixed seed): no contender always follows the same one and finds the caches as
    that one leaves them. Garbage collection rests meanwhile. Two calls come before, unmeasured: the first
    builds what is built on first use, the second tells how often to repeat within a sample.

    Args:
        calls: what to time, by name.
        effort: how long.
        contender_of: from a name to the contender it is a variant of; by default all are different.
    """
    inner = {name: _inner(call, effort) for name, call in calls.items()}
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(effort.samples):
            if done >= effort.least:
                order = _worth_it(order, samples, inner, effort, contender_of)
            shuffle(order)
            for name in order:
                if effort.before_each is not None:
                    effort.before_each()
                samples[name].append(effort.seconds(calls[name], inner[name]) / inner[name])
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(found, inner[name]) for name, found in samples.items()}


def _worth_it(
    names: list[Key],
    samples: Mapping[Key, list[float]],
    inner: Mapping[Key, int],
    effort: Effort,
    contender_of: Callable[[Key], object],
) -> list[Key]:
    """Those that are within their budget and not hopeless."""
    best: dict[object, float] = {}
    for name, found in samples.items():
        best[contender_of(name)] = min(min(found), best.get(contender_of(name), math.inf))
    return [
        name
        for name in names
        if inner[name] * sum(samples[name]) <= effort.budget
        and min(samples[name]) <= effort.hopeless * best[contender_of(name)]
    ]


def _inner(call: Call, effort: Effort) -> int:
    """Calls per sample; also the warm-up."""
    call()
    once = effort.seconds(call, 1)
    return 1 if effort.before_each is not None else max(1, math.ceil(effort.min_time / max(once, 1e-9)))


def wall_seconds(call: Call, times: int) -> float:
    """Of so many calls, one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def summarise(samples: list[float], inner: int) -> Timing:
    """Quantiles of samples, in seconds per call."""
    ordered = sorted(samples)
    median, q20, q80 = (quantile(ordered, share) for share in (0.5, 0.2, 0.8))
    return Timing(median, q20, q80, ordered[0], len(samples), inner)


def quantile(ordered: list[float], share: float) -> float:
    """By linear interpolation between ordered samples."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
