# SPDX-License-Identifier: Apache-2.0
"""What a person watching a run sees on stderr: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Progress:
    """Says nothing. The base of the two that do, and what library callers get."""

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        """The run starts; `done` rounds are there already."""

    def round(self, method: str, number: int) -> None:
        """A round of a method starts."""

    def client(self, number: int, count: int, client: int) -> None:
        """The number-th of count clients starts its turn."""

    def step(self, number: int, count: int) -> None:
        """A client finished training step number of count."""

    def row(self, row: dict[str, Any]) -> None:
        """A round of a method ended."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def end(self) -> None:
        """The run ended, for whatever reason."""


def summary_line(row: dict[str, Any]) -> str:
    """One row of metrics for human eyes."""
    text = f"{row['method']:<18} round {row['round']:>3}"
    if row["accuracy"] is not None:
        text += f"  accuracy {100 * row['accuracy']:5.2f} %"
    if row["personal_accuracy"] is not None:
        text += f"  personal {100 * row['personal_accuracy']:5.2f} %"
    text += f"  up {row['bytes_up'] / 1e6:.3f} MB  down {row['bytes_down'] / 1e6:.3f} MB"
    text += f"  compute {row['time']['compute']:.1f} s"
    if row["refused"]:
        text += f"  refused {len(row['refused'])}"
    return text


class Lines(Progress):
    """One plain line a round, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        """See Progress."""
        resumed = f", {done} already done" if done else ""
        self.note(f"{' and '.join(methods)}: {rounds} rounds{resumed}")

    def row(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self.note(summary_line(row))

    def note(self, text: str) -> None:
        """See Progress."""
        print(text, file=self._stream, flush=True)


class Bars(Progress):
    """Three nested bars: rounds, clients of the round, steps of the client."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._stream = stream
        self._bars: list[Any] = []
        self._latest: dict[str, str] = {}

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        """See Progress."""
        common: dict[str, Any] = {"file": self._stream, "dynamic_ncols": True, "leave": False}
        self._bars = [
            self._tqdm(total=rounds * len(methods), initial=done * len(methods), desc="rounds ", **common),
            self._tqdm(total=1, desc="clients", position=1, **common),
            self._tqdm(total=1, desc="steps  ", position=2, **common),
        ]

    def round(self, method: str, number: int) -> None:
        """See Progress."""
        self._bars[0].set_description(f"{method} round {number}")

    def client(self, number: int, count: int, client: int) -> None:
        """See Progress."""
        _move(self._bars[1], number, count)

    def step(self, number: int, count: int) -> None:
        """See Progress."""
        _move(self._bars[2], number, count)

    def row(self, row: dict[str, Any]) -> None:
        """See Progress."""
        accuracy = row["personal_accuracy"] if row["accuracy"] is None else row["accuracy"]
        self._latest[row["method"]] = "-" if accuracy is None else f"{100 * accuracy:.1f}%"
        self._bars[0].set_postfix(self._latest, refresh=False)
        if row["round"] > 0:
            self._bars[0].update(1)
        self.note(summary_line(row))

    def note(self, text: str) -> None:
        """See Progress."""
        self._tqdm.write(text, file=self._stream)

    def end(self) -> None:
        """See Progress."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []


def _move(bar: Any, number: int, count: int) -> None:
    if bar.total != count:
        bar.reset(total=count)
    bar.n = number
    bar.refresh()


def for_stream(stream: TextIO | None = None) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    stream = sys.stderr if stream is None else stream
    return Bars(stream) if stream.isatty() else Lines(stream)
