# SPDX-License-Identifier: Apache-2.0
"""What a person watching a grid sees on stderr: a bar over cells on a terminal, a line a cell anywhere else."""

from __future__ import annotations

import time
from typing import Any, TextIO

from fedpai.federation.progress import Progress, summary_line


class GridProgress:
    """Follows the runs of a grid. A cell counts by its finished rounds.

    Args:
        stream: where to.
        total, done: cells of the grid, and those that are finished already.
    """

    def __init__(self, stream: TextIO, total: int, done: int) -> None:
        self._stream = stream
        self._total = total
        self._done = done
        self._under_way: dict[str, CellProgress] = {}
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, file=stream, dynamic_ncols=True, leave=False, bar_format=_BAR
            )

    def cell(self, name: str) -> CellProgress:
        """A cell starts or goes on: who is to be told about it."""
        self._under_way[name] = CellProgress(self)
        self.move()
        return self._under_way[name]

    def finished(self, name: str) -> None:
        """A cell is done."""
        self._done += 1
        self.note(f"[{self._done}/{self._total}] {name}: {self._under_way.pop(name).summary()}")
        self.move()

    def note(self, text: str) -> None:
        """Something worth a line."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def move(self) -> None:
        """Some cell got on."""
        if self._bar is not None:
            self._bar.n = self._done + sum(cell.share for cell in self._under_way.values())
            self._bar.set_description(", ".join(self._under_way), refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        """The grid ended, for whatever reason."""
        if self._bar is not None:
            self._bar.close()


class CellProgress(Progress):
    """Follows one run of a grid.

    Attributes:
        share: of its rounds that are finished, the choosing of masks counted as one.
    """

    share = 0.0

    def __init__(self, grid: GridProgress) -> None:
        self._grid = grid
        self._start = time.monotonic()
        self._last: dict[str, Any] | None = None

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        """See Progress."""
        self._rounds = rounds

    def row(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._last = row
        self.share = row["round"] / (self._rounds + 1)
        self._grid.move()

    def note(self, text: str) -> None:
        """See Progress."""
        self._grid.note(text)

    def summary(self) -> str:
        """Its last round and how long it took."""
        result = "" if self._last is None else summary_line(self._last)
        return f"{result}  took {time.monotonic() - self._start:.0f} s"


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} cells {elapsed}<{remaining} {desc}"
