# SPDX-License-Identifier: Apache-2.0
"""A grid on disk: runs what is missing, keeps what is finished.

    compare.json         the grid, and the link and target of its times
    cells/<name>/        one run folder for each cell, and in it, once the run is finished, machine.json: where it ran
    results.jsonl        one row a finished cell (results.py)
    report.html          tables and plots

The rows and the page follow from the cells and are written anew after each of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpai.compare import page
from fedpai.compare.grid import AXES, Cell, check, expand
from fedpai.compare.progress import GridProgress
from fedpai.compare.results import Finished, Row, result_rows, sections, to_lines
from fedpai.compare.workers import MACHINE_FILE, Task, carry_out, side_by_side
from fedpai.data import Dataset
from fedpai.federation.config import MOVABLE, ConfigError, RunConfig, differences
from fedpai.federation.files import write_atomic
from fedpai.federation.folder import FolderError, RunFolder, held
from fedpai.federation.link_speed import LinkSpeed
from fedpai.federation.runner import load_data

LINK = LinkSpeed(1e6, 10e6)
"""What times are stated for unless a link is given: 1 MB/s up, 10 MB/s down."""
GRID_FILE = "compare.json"
CELLS = "cells"


@dataclass(frozen=True)
class Grid:
    """What a study is asked to do.

    Attributes:
        axes: lists of values by axis.
        settings: the other settings of all its runs.
        times: what times are stated for, as far as it was given: fields of `LinkSpeed`, and "target".
    """

    axes: dict[str, list[Any]]
    settings: dict[str, Any]
    times: dict[str, float]

    @property
    def link(self) -> LinkSpeed:
        """What was given of it, and LINK for the rest."""
        return replace(LINK, **{key: value for key, value in self.times.items() if key != "target"})

    @property
    def target(self) -> float | None:
        """The accuracy that times are counted to; None: a point less than dense FedAvg's."""
        return self.times.get("target")


class Study:
    """A grid in its folder. Use `create` or `reopen`, and work in the block of `held`."""

    def __init__(self, path: Path, grid: Grid, cells: Sequence[Cell], data: Dataset, jobs: int) -> None:
        self.path = path
        self.grid = grid
        self.cells = cells
        self._data = data
        self._jobs = jobs

    @classmethod
    def create(cls, path: Path, grid: Grid, explicit: frozenset[str], jobs: int = 1) -> Study:
        """Starts a grid in a new or empty folder, once all of it is known to be possible.

        Args:
            explicit: axes and settings that a person asked for, of which some method must make use.
            jobs: runs side by side, each in a process of its own and with all the threads of its settings.

        Raises:
            ConfigError, DataError: what cannot be; nothing was written then.
            FolderError: the folder holds something already, or cannot be made.
        """
        if (path / GRID_FILE).exists():
            raise FolderError(f"{path} already holds a grid; go on with it by --resume, or choose another --out")
        RunFolder.check_vacant(path)
        return cls._open(path, grid, explicit, jobs)

    @classmethod
    def reopen(cls, path: Path, asked: Grid, explicit: frozenset[str], jobs: int = 1) -> Study:
        """Opens a folder to go on with its grid.

        Args:
            asked: what was given again. Settings must agree with the folder's; an axis may have other values than
                before, and finished cells that are still in the grid are kept; times may be for another link.
            explicit, jobs: see `create`.

        Raises:
            FolderError: no grid there, or settings that differ; the message names each of them.
        """
        stored = stored_grid(path)
        full = {**RunConfig().to_json(), **stored.settings}
        different = differences(asked.settings, full)
        if different:
            raise FolderError(f"{path} is a grid of other settings: " + "; ".join(different))
        moved = {key: value for key, value in asked.settings.items() if key in MOVABLE}
        grid = Grid(
            {**stored.axes, **asked.axes}, {**stored.settings, **moved}, {**stored.times, **asked.times}
        )
        return cls._open(path, grid, explicit, jobs)

    @classmethod
    def _open(cls, path: Path, grid: Grid, explicit: frozenset[str], jobs: int) -> Study:
        cells = expand(grid.axes, grid.settings, explicit)
        data = load_data(cells[0].config)
        check(cells, data)
        check_jobs(jobs, cells[0].config.threads)
        return cls(path, grid, cells, data, jobs)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from working in the folder for the length of a block, and writes the grid down.

        Raises:
            FolderError: another process works there, or the folder cannot be made.
            WriteError: the grid cannot be written.
        """
        with held(self.path):
            write_atomic(self.path / GRID_FILE, (json.dumps(asdict(self.grid), indent=2) + "\n").encode())
            yield

    def cell_path(self, cell: Cell) -> Path:
        """A cell's run folder."""
        return self.path / CELLS / cell.name

    def finished(self) -> list[Finished]:
        """The finished cells with their rows, in the order of the grid.

        Raises:
            FolderError: a cell's folder that holds another run or is damaged.
        """
        found = []
        for cell in self.cells:
            path = self.cell_path(cell)
            if (path / MACHINE_FILE).exists():
                rows = RunFolder.reopen(path, cell.config.to_json()).rows()
                machine = json.loads((path / MACHINE_FILE).read_text(encoding="utf-8"))
                found.append(Finished(cell, rows, machine))
        return found

    def finish(self, progress: GridProgress) -> None:
        """Runs every cell that is not finished, each from where it was interrupted if it was.

        Raises:
            FolderError, ConfigError, MethodError: from a cell; those before it are kept.
            WorkerError: the process of a cell ended; the same.
        """
        done = {one.cell.name for one in self.finished()}
        tasks = [Task(cell.name, self.cell_path(cell), cell.config) for cell in self.cells if cell.name not in done]
        for name in self._carried_out(tasks, progress):
            self.save()
            progress.finished(name)

    def _carried_out(self, tasks: Sequence[Task], progress: GridProgress) -> Iterator[str]:
        if self._jobs > 1:
            yield from side_by_side(tasks, self._jobs, progress.cell)
        else:
            for task in tasks:
                carry_out(task, progress.cell(task.name), self._data, self._jobs)
                yield task.name

    def save(self) -> list[Row]:
        """Writes the rows and the page of what is finished, and returns the rows."""
        rows = result_rows(self.finished(), self.grid.link, self.grid.target)
        write_atomic(self.path / "results.jsonl", to_lines(rows).encode())
        if rows:
            settings = {"axes": self.grid.axes, **self.grid.settings}
            page.write(self.path / "report.html", sections(rows), rows, settings, len(self.cells) - len(rows))
        return rows


def check_jobs(jobs: int, threads: int) -> None:
    """So many runs of so many threads at once must find a core for each thread: waiting threads spin.

    Raises:
        ConfigError: they do not.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: got {jobs}, expected at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > 1 and jobs * threads > cores:
        raise ConfigError(
            f"jobs: {jobs} runs side by side, each of {threads} thread{'s' * (threads > 1)} (--threads), "
            f"want {jobs * threads} cores; there are {cores}"
        )


def stored_grid(path: Path) -> Grid:
    """The grid in a folder.

    Raises:
        FolderError: no grid there, or a file that cannot be read.
    """
    file = path / GRID_FILE
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        grid = Grid(**stored)
        _ = grid.link
        if not (set(grid.axes) <= set(AXES) and set(grid.settings) <= set(RunConfig.__dataclass_fields__)):
            raise ConfigError("axes or settings that this version does not know")
    except FileNotFoundError:
        raise FolderError(f"{path} holds no grid to go on with (no {GRID_FILE})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FolderError(f"{file} cannot be used: {error!r}") from None
    return grid
