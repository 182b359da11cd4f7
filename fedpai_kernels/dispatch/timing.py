# SPDX-License-Identifier: Apache-2.0
"""How long work takes on a CUDA device, as it would take in a step that is not held up by launches.

A small layer's kernels run for less time than Python needs to launch them, so that the time from call to call would
say which candidate is launched by less Python. Work is therefore queued behind a kernel that only waits, long enough
for the host to have queued everything, and the time between two events is the device's alone, as in the replay of a
CUDA graph. Operands are as warm in the caches as the rounds leave them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Final, Protocol

import torch

Run = Callable[[], object]

_WARM_UPS: Final = 3
_ROUNDS: Final = 11
_CYCLES_A_SECOND: Final = 2e9
"""No less than any GPU's clock."""
_LONGEST_WAIT: Final = 0.25
"""Seconds."""


class Timer(Protocol):
    """Compares pieces of work."""

    def microseconds(self, runs: Sequence[Run]) -> list[float]:
        """What each takes, in the order given. All have run once before."""


class EventTimer:
    """A :class:`Timer` by CUDA events on the current stream: medians of rounds in which all runs take turns."""

    def microseconds(self, runs: Sequence[Run]) -> list[float]:
        """Waits for the device; not to be called while a CUDA graph is captured."""
        cuda: Any = torch.cuda
        for _ in range(_WARM_UPS):
            for run in runs:
                run()
        cuda.synchronize()
        started = time.perf_counter()
        for run in runs:
            run()
        queued_in = time.perf_counter() - started
        cuda.synchronize()

        def event() -> Any:
            return cuda.Event(enable_timing=True)

        events = [[(event(), event()) for _ in runs] for _ in range(_ROUNDS)]
        wait = min(2 * _ROUNDS * queued_in, _LONGEST_WAIT)
        cuda._sleep(int(wait * _CYCLES_A_SECOND))
        for round_of in events:
            for run, (begin, end) in zip(runs, round_of, strict=True):
                begin.record()
                run()
                end.record()
        cuda.synchronize()
        by_run = zip(*events, strict=True)
        return [median(1000 * begin.elapsed_time(end) for begin, end in of_run) for of_run in by_run]
