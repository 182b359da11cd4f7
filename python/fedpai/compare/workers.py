# SPDX-License-Identifier: Apache-2.0
"""Runs of a grid, one after the other, or side by side in processes that each take the next run when done with one.

Processes, because a run sets the threads and the random numbers of the whole process that it is in. They are started
afresh: a copy of a process in which torch has threads would hang.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from fedpai.bench.machine import identity
from fedpai.data import DataError, Dataset
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.files import WriteError
from fedpai.federation.folder import FolderError, RunFolder, held
from fedpai.federation.progress import Progress
from fedpai.federation.runner import Run, load_data
from fedpai.methods.base import MethodError

MACHINE_FILE = "machine.json"
"""Written into a run's folder last: where it ran, and how many ran side by side."""


class WorkerError(RuntimeError):
    """A process ended before its run did, as it does when memory runs out."""


@dataclass(frozen=True)
class Task:
    """A run to be carried out, or to go on with.

    Attributes:
        name: of the cell.
        path: its run folder.
        config: its settings.
    """

    name: str
    path: Path
    config: RunConfig


def carry_out(task: Task, progress: Progress, data: Dataset, jobs: int) -> None:
    """Finishes a run in this process, from where it was interrupted if it was.

    Raises:
        FolderError, ConfigError, MethodError: from the run.
    """
    with held(task.path):
        if (task.path / "config.json").exists():
            folder = RunFolder.reopen(task.path, task.config.to_json())
        else:
            RunFolder.clear(task.path)
            folder = RunFolder.create(task.path, task.config)
        try:
            Run(folder.config, folder, progress, data=data).finish()
        except (ConfigError, MethodError) as error:
            raise type(error)(f"{task.name}: {error}") from None
        folder.write(MACHINE_FILE, (json.dumps({**identity(), "jobs": jobs}) + "\n").encode())


def side_by_side(tasks: Sequence[Task], jobs: int, progress: Callable[[str], Progress]) -> Iterator[str]:
    """Carries out all tasks, `jobs` at a time, and yields their names as they are finished.

    Args:
        progress: who is told about a run, by its name; asked for when the run starts.

    Raises:
        FolderError, ConfigError, MethodError: from a run. The others lose the round under way.
        WorkerError: a process ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(jobs, len(tasks))):
            worker = _Worker(context, jobs)
            workers[worker.connection] = worker
            worker.give(waiting.popleft(), progress)
        while workers:
            for connection in wait(list(workers)):
                worker = workers[cast(Connection, connection)]
                if not worker.heard():
                    continue
                yield worker.task.name
                if waiting:
                    worker.give(waiting.popleft(), progress)
                else:
                    workers.pop(worker.connection).stop()
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """A process, seen from the one that started it."""

    task: Task

    def __init__(self, context: multiprocessing.context.SpawnContext, jobs: int) -> None:
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, jobs), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: Task, progress: Callable[[str], Progress]) -> None:
        self.task = task
        self._progress = progress(task.name)
        self.connection.send(task)

    def heard(self) -> bool:
        """Takes one message. True when the task is finished."""
        try:
            kind, *arguments = self.connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(
                f"{self.task.name}: its process ended with exit code {self._process.exitcode} "
                "(-9: killed, as for want of memory)"
            ) from None
        if kind == "failed":
            raise arguments[0]
        if kind == "finished":
            return True
        getattr(self._progress, kind)(*arguments)
        return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


class _Sender(Progress):
    """What is worth telling across processes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def begin(self, methods: tuple[str, ...], rounds: int, done: int) -> None:
        self._connection.send(("begin", methods, rounds, done))

    def row(self, row: dict[str, Any]) -> None:
        self._connection.send(("row", row))

    def note(self, text: str) -> None:
        self._connection.send(("note", text))


def _serve(connection: Connection, jobs: int) -> None:
    """A process: carries out tasks until it is stopped, or the other end is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the first one stops the others
    data = lru_cache(maxsize=1)(lambda name, root: load_data(RunConfig(data=name, data_root=root)))
    try:
        while True:
            task: Task = connection.recv()
            try:
                carry_out(task, _Sender(connection), data(task.config.data, task.config.data_root), jobs)
            except (ConfigError, DataError, FolderError, MethodError, WriteError) as error:
                connection.send(("failed", error))
                return
            connection.send(("finished",))
    except (EOFError, BrokenPipeError):
        pass  # nobody is there to listen
    except Exception:
        traceback.print_exc()
        sys.exit(1)
