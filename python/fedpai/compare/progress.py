# SPDX-License-Identifier: Apache-2.0
"""What a person watching a grid sees on stderr: a bar over cells on a terminal, a line a cell anywhere else."""

from __future__ import annotations

import time
from typing import Any, TextIO

from fedpai.federation.progress import Progress, summary_line


class GridProgress(Progress):
    """Follows the runs of a grid, one after the other. A cell counts by its finished rounds.

    Args:
        stream: where to.
        total, done: cells of the grid, and those that are finished already.
    """

    def __init__(self, stream: TextIO, total: int, done: int) -> None:
        self._stream = stream
        self._total = total
        self._done = done
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, file=stream, dynamic_ncols=True, leave=False, bar_format=_BAR
            )

    def cell(self, name: str) -> None:
        """A cell starts or goes on."""
        self._name = name
        self._start = time.monotonic()
        self._last: dict[str, Any] | None = None
        if self._bar is not None:
            self._bar.set_description(name)

    def finished(self) -> None:
        """The cell is done."""
        self._done += 1
        result = "" if self._last is None else summary_line(self._last)
        self.note(f"[{self._done}/{self._total}] {self._name}: {result}  took {time.monotonic() - self._start:.0f} s")
        self._move(float(self._done))

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        """See Progress."""
        self._rounds = rounds

    def row(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._last = row
        self._move(self._done + row["round"] / (self._rounds + 1))

    def note(self, text: str) -> None:
        """See Progress."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """The grid ended, for whatever reason."""
        if self._bar is not None:
            self._bar.close()

    def _move(self, cells: float) -> None:
        if self._bar is not None:
            self._bar.n = cells
            self._bar.refresh()


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} cells {elapsed}<{remaining} {desc}"
