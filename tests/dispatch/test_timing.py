# SPDX-License-Identifier: Apache-2.0
"""The timer's order of work, with a device of which only the clock is real."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpai_kernels.dispatch import timing


class Device:
    """A queue that runs what it is given in that order; each piece of work says how long it takes."""

    def __init__(self) -> None:
        self.clock, self.slept, self.synchronised = 0.0, 0, 0

    def work(self, microseconds: list[float]) -> Any:
        def run() -> None:
            self.clock += microseconds[0] if len(microseconds) == 1 else microseconds.pop(0)

        return run

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        device = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = device.clock

            def elapsed_time(self, end: Event) -> float:
                assert device.synchronised == 3, "events are read when the device is done"
                return (end.at - self.at) / 1000

        return Event()


def test_medians_of_what_is_queued_behind_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def sleep(cycles: int) -> None:
        assert cycles > 0
        device.slept += 1

    def synchronize() -> None:
        device.synchronised += 1

    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    outliers = [1.0] * (timing._WARM_UPS + 1) + [500.0, 90.0, 0.1] + [7.0]
    times = timing.EventTimer().microseconds([device.work([30.0]), device.work(outliers), device.work([20.0])])
    assert times == pytest.approx([30.0, 7.0, 20.0])
    assert device.slept == 1
