# SPDX-License-Identifier: Apache-2.0
"""Times over a link, against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedpai.data import Dataset
from fedpai.federation.client import ClientError
from fedpai.federation.config import RunConfig
from fedpai.federation.engine import Reply
from fedpai.federation.link_speed import LinkSpeed, LinkTimes, link_times, parse_rate
from fedpai.federation.runner import Run


def row(
    number: int,
    turns: list[tuple[int, float, int]],
    merge: float = 0.0,
    accuracy: float | None = None,
    personal: float | None = None,
) -> dict[str, Any]:
    """A row of metrics with (bytes down, seconds, bytes up) of each client."""
    return {
        "round": number,
        "accuracy": accuracy,
        "personal_accuracy": personal,
        "clients": [
            {"client": client, "bytes_down": down, "bytes_up": up} for client, (down, _, up) in enumerate(turns)
        ],
        "time": {"clients": [seconds for _, seconds, _ in turns], "merge": merge},
    }


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1MB/s", 1e6),
        ("500KB/s", 5e5),
        ("500kB/s", 5e5),
        ("8Mbit/s", 1e6),
        ("1.5 GB/s", 1.5e9),
        (" .5MB/s ", 5e5),
        ("64kbit/s", 8e3),
        ("100B/s", 100.0),
        ("1bit/s", 0.125),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "1", "1MB", "MB/s", "1Mb/s", "1mB/s", "0MB/s", "-1MB/s", "nanMB/s", "1e3B/s", "1MiB/s", "1MB/s x"]
)
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="expected a positive rate with its unit, such as 500KB/s, 1MB/s or 8Mbit/s"):
        parse_rate(text)


def test_a_round_is_as_long_as_its_slowest_client() -> None:
    link = LinkSpeed(uplink=100.0, downlink=1000.0, slowdown=3.0)
    # 500/1000 + 3*2 + 50/100 = 7; 2000/1000 + 3*1 + 300/100 = 8; then 0.25 of merging, at the server's own speed.
    assert link.round_seconds(row(1, [(500, 2.0, 50), (2000, 1.0, 300)], merge=0.25)) == 8.25
    # A faster device makes the other one the slowest: 0.5 + 1 + 0.5 = 2 against 2 + 0.5 + 3 = 5.5.
    assert LinkSpeed(100.0, 1000.0, 0.5).round_seconds(row(1, [(500, 2.0, 50), (2000, 1.0, 300)])) == 5.5
    assert link.round_seconds(row(0, [], merge=0.5)) == 0.5, "a round that asks nobody is the server's work alone"


ROWS = [
    row(0, [(0, 1.0, 1000)], merge=0.5, accuracy=0.1),
    row(1, [(1000, 1.0, 100)], accuracy=0.5, personal=0.7),
    row(2, [(1000, 1.0, 100)], accuracy=0.8, personal=0.6),
    row(3, [(1000, 1.0, 100)], accuracy=0.7, personal=0.9),
]
LINK = LinkSpeed(uplink=100.0, downlink=1000.0)


def test_choosing_masks_counts() -> None:
    # 1 + 1000/100 + 0.5 = 11.5, then 1000/1000 + 1 + 100/100 = 3 a round.
    assert LINK.elapsed(ROWS) == [11.5, 14.5, 17.5, 20.5]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, LinkTimes(20.5, None, None, None, None, None)),
        (0.8, LinkTimes(20.5, 0.8, 17.5, 2, 20.5, 3)),
        (0.7, LinkTimes(20.5, 0.7, 17.5, 2, 14.5, 1)),
        (0.85, LinkTimes(20.5, 0.85, None, None, 20.5, 3)),
        (0.05, LinkTimes(20.5, 0.05, 11.5, 0, 14.5, 1)),
        (0.99, LinkTimes(20.5, 0.99, None, None, None, None)),
    ],
)
def test_time_to_an_accuracy(target: float | None, expected: LinkTimes) -> None:
    assert link_times(ROWS, LINK, target) == expected


def test_a_method_without_a_global_model() -> None:
    rows = [{**one, "accuracy": None} for one in ROWS]
    assert link_times(rows, LINK, 0.7) == LinkTimes(20.5, 0.7, None, None, 14.5, 1)


def test_in_words() -> None:
    assert str(LinkSpeed(1e6, 1e7)) == "1 MB/s up, 10 MB/s down"
    assert str(LinkSpeed(125e3, 2.5e9, 5)) == "125 KB/s up, 2.5 GB/s down, devices 5 x slower than this machine"


def test_rows_say_what_each_client_cost(images: Dataset, tiny: Callable[..., RunConfig]) -> None:
    """Bytes and seconds of every turn; a client that cannot be reached was sent its messages all the same."""
    run = Run(tiny(method="fedpai-u", criterion="snip", rounds=1, clients=3, sample=3), data=images)
    federation = run.arms[0].federation
    before = federation.choose_masks()
    assert [client["client"] for client in before["clients"]] == [0, 1, 2]
    assert before["time"]["proposals"] == sum(before["time"]["clients"])
    assert before["time"]["proposals"] + before["time"]["merge"] <= before["time"]["masks"]

    class Dead:
        def turn(self, client: int, round: int, messages: list[bytes]) -> Reply:
            if client == 1:
                raise ClientError("out of battery")
            return run.arms[0].clients.turn(client, round, messages)

    federation._link = Dead()
    row = federation.run_round()
    for way in ("bytes_up", "bytes_down"):
        assert row[way] == sum(client[way] for client in row["clients"]) > 0
    dead = row["clients"][1]
    assert (dead["client"], dead["bytes_up"]) == (1, 0)
    assert dead["bytes_down"] == row["clients"][0]["bytes_down"]
    assert row["time"]["clients"][1] == 0
    assert sum(row["time"]["clients"]) > row["time"]["compute"] > 0
