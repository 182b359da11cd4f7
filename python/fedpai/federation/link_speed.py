# SPDX-License-Identifier: Apache-2.0
"""The third speed: how long a run would take over a stated link, computed from its rows.

The model (docs/federation.md): the clients of a round work at the same time, each at its own end of the link, and the
server waits for the slowest. With client k's bytes and the seconds s_k that its turn took on this machine, a round
takes

    max_k (down_k / downlink + slowdown * s_k + up_k / uplink) + merge

and round 0, in which masks are chosen, counts as any other. Evaluating is no part of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

Row = dict[str, Any]

_RATE = re.compile(r"(\d+\.?\d*|\.\d+) ?([kKMG]?)(B|bit)/s")
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


def parse_rate(text: str) -> float:
    """Bytes per second from a number and its unit: B/s or bit/s, with k, M or G (decimal) before it.

    Raises:
        ValueError: anything else; a small b alone is refused, since some mean bits by it and some bytes.
    """
    found = _RATE.fullmatch(text.strip())
    rate = 0.0
    if found is not None:
        rate = float(found[1]) * _PREFIXES[found[2]] / (8 if found[3] == "bit" else 1)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"got {text!r}, expected a positive rate with its unit, such as 500KB/s, 1MB/s or 8Mbit/s")
    return rate


@dataclass(frozen=True)
class LinkSpeed:
    """What stands between a client and the server, and how slow a client's device is.

    Attributes:
        uplink, downlink: bytes per second, of each client.
        slowdown: a device's time over this machine's for the same work.
    """

    uplink: float
    downlink: float
    slowdown: float = 1.0

    def round_seconds(self, row: Row) -> float:
        """One row of metrics as seconds."""
        turns = (
            client["bytes_down"] / self.downlink + self.slowdown * seconds + client["bytes_up"] / self.uplink
            for client, seconds in zip(row["clients"], row["time"]["clients"], strict=True)
        )
        return float(max(turns, default=0.0) + row["time"]["merge"])

    def elapsed(self, rows: Sequence[Row]) -> list[float]:
        """Seconds from the start to the end of each of a method's rounds, round 0 first."""
        return list(accumulate(self.round_seconds(row) for row in rows))

    def to_json(self) -> dict[str, float]:
        """Plain types."""
        return asdict(self)

    def __str__(self) -> str:
        rates = f"{_rate(self.uplink)} up, {_rate(self.downlink)} down"
        return rates if self.slowdown == 1 else f"{rates}, devices {self.slowdown:g} x slower than this machine"


def _rate(rate: float) -> str:
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("KB/s", 1e3)):
        if rate >= size:
            return f"{rate / size:g} {unit}"
    return f"{rate:g} B/s"


@dataclass(frozen=True)
class LinkTimes:
    """A method's rounds under a link; None where the target was not reached or there is none.

    Attributes:
        seconds: of all rounds.
        target: the accuracy to reach, a share.
        target_seconds, target_round: until the global model first reaches it.
        personal_target_seconds, personal_target_round: until the clients' personalised accuracy does.
    """

    seconds: float
    target: float | None
    target_seconds: float | None
    target_round: int | None
    personal_target_seconds: float | None
    personal_target_round: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def link_times(rows: Sequence[Row], link: LinkSpeed, target: float | None) -> LinkTimes:
    """When a method's rounds end, and when it is as good as the target.

    Args:
        rows: of one method, round 0 first.
        target: accuracy as a share; None for no target.
    """
    elapsed = link.elapsed(rows)
    reached: list[Any] = []
    for key in ("accuracy", "personal_accuracy"):
        good = (
            (seconds, row["round"])
            for seconds, row in zip(elapsed, rows, strict=True)
            if target is not None and row[key] is not None and row[key] >= target
        )
        reached += next(good, (None, None))
    return LinkTimes(elapsed[-1], target, *reached)
