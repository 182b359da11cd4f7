# SPDX-License-Identifier: Apache-2.0
"""The run folder: what is on disk, when it may be used, and how it stays whole.

    config.json                       the settings
    metrics.jsonl                     one row a round and method, in the order they ran
    checkpoint-<method>.safetensors   state after that method's last finished round
    model-<method>.safetensors        the final global model as a dense state_dict
    profile.json, report.html         written at the end

A row is appended before its checkpoint is written, so rows may be ahead of the checkpoint by one round and
never behind; on resuming, rows beyond the checkpoint are dropped and that round runs again. Two processes would mix
their rows, so one holds the folder (`held`) and others are refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpai.federation import checkpoint
from fedpai.federation.bound import ModelPool
from fedpai.federation.checkpoint import CheckpointError, Restored
from fedpai.federation.config import ConfigError, RunConfig, differences
from fedpai.federation.files import PART, append_line, write_atomic

Row = dict[str, Any]


class FolderError(ValueError):
    """A run folder that cannot be used as asked. Nothing in it was changed."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Makes a folder if it is not there, and keeps other processes from working in it for the length of a block.

    The system frees it however the process ends. File systems without locks hold nothing.

    Raises:
        FolderError: another process holds it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise FolderError(f"cannot write the folder {path}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FolderError(f"another process is at work in {path}; go on by --resume once it has ended") from None
    except OSError:
        pass  # no locks here
    try:
        yield
    finally:
        os.close(handle)


class RunFolder:
    """One run on disk. Use `create` or `reopen`, and `held` around both and the run."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """Starts a run in a new or empty folder.

        Raises:
            FolderError: the folder holds a run already, or other files, or cannot be made.
        """
        cls.check_vacant(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.json", (json.dumps(config.to_json(), indent=2) + "\n").encode())
        except OSError as error:
            raise FolderError(f"cannot write the run folder {path}: {error.strerror}") from None
        return cls(path, config)

    @staticmethod
    def check_vacant(path: Path) -> None:
        """Raises FolderError unless a new run may start in a folder: it is absent or empty."""
        if (path / "config.json").exists():
            raise FolderError(
                f"{path} already holds a run; go on with it by --resume, or choose another --out"
            )
        if path.exists() and not path.is_dir():
            raise FolderError(f"{path} is a file; choose another --out")
        if path.is_dir() and any(path.iterdir()):
            raise FolderError(f"{path} is not empty and is no run folder; choose another --out")

    @classmethod
    def stored_config(cls, path: Path) -> RunConfig:
        """The settings of the run in a folder.

        Raises:
            FolderError: no run there, or a config.json that cannot be read.
        """
        file = path / "config.json"
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return RunConfig.from_json(stored if isinstance(stored, dict) else {})
        except FileNotFoundError:
            raise FolderError(f"{path} holds no run to resume (no config.json)") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, ConfigError) as error:
            raise FolderError(f"{file} cannot be used: {error}") from None

    @classmethod
    def reopen(cls, path: Path, asked: dict[str, Any]) -> RunFolder:
        """Opens a folder to go on with its run.

        Args:
            asked: settings that were given explicitly; they must agree with the folder's.

        Raises:
            FolderError: no run there, or settings that differ; the message names each of them.
        """
        config = cls.stored_config(path)
        stored = config.to_json()
        different = differences(asked, stored)
        if different:
            raise FolderError(f"{path} is a run of another configuration: " + "; ".join(different))
        moved = {key: value for key, value in asked.items() if stored[key] != value}
        cls.clear(path)
        return cls(path, RunConfig.from_json({**stored, **moved}))

    @staticmethod
    def clear(path: Path) -> None:
        """Removes what a process that was killed had half written.

        Raises:
            FolderError: it cannot be removed.
        """
        try:
            for leftover in path.glob(f"*{PART}"):
                leftover.unlink()
        except OSError as error:
            raise FolderError(f"cannot write the run folder {path}: {error.strerror}") from None

    # -- metrics -----------------------------------------------------------------------------------------

    @property
    def metrics_file(self) -> Path:
        """Where the rows are."""
        return self.path / "metrics.jsonl"

    def rows(self) -> list[Row]:
        """All rows, oldest first. A last line that was cut off by a crash is left out.

        Raises:
            FolderError: a line before the last that is no row.
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                row = json.loads(line)
                if not (isinstance(row, dict) and {"method", "round"} <= row.keys()):
                    raise ValueError("no method and round")
            except ValueError as error:
                if number == len(lines) - 1:
                    break
                raise FolderError(f"{self.metrics_file}, line {number + 1} is damaged: {error}") from None
            rows.append(row)
        return rows

    def append(self, row: Row) -> None:
        """Adds a row."""
        append_line(self.metrics_file, json.dumps(row))

    def keep_rows(self, last_round: dict[str, int]) -> list[Row]:
        """Drops the rows beyond each method's last checkpointed round and returns the rest.

        Raises:
            FolderError: a row that should be there is missing.
        """
        rows = [row for row in self.rows() if row["round"] <= last_round.get(row["method"], -1)]
        for method, last in last_round.items():
            present = [row["round"] for row in rows if row["method"] == method]
            if present != list(range(last + 1)):
                raise FolderError(
                    f"{self.metrics_file} lacks rounds of {method}, whose checkpoint is after round {last}"
                )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not self.metrics_file.exists() or self.metrics_file.read_text(encoding="utf-8") != text:
            write_atomic(self.metrics_file, text.encode())
        return rows

    # -- checkpoints -------------------------------------------------------------------------------------

    def checkpoint_file(self, method: str) -> Path:
        """Where a method's state is."""
        return self.path / f"checkpoint-{method}.safetensors"

    def save(self, method: str, data: bytes) -> None:
        """Replaces a method's checkpoint."""
        write_atomic(self.checkpoint_file(method), data)

    def restore(self, method: str, pool: ModelPool) -> Restored | None:
        """A method's state after its last finished round; None before the first.

        Raises:
            FolderError: a checkpoint that is damaged or belongs to another model, mask or method.
        """
        file = self.checkpoint_file(method)
        if not file.exists():
            return None
        try:
            return checkpoint.load(file.read_bytes(), method, self.config, pool)
        except CheckpointError as error:
            raise FolderError(f"{file}: {error}") from None

    def write(self, name: str, data: bytes) -> Path:
        """Replaces any other file of the folder."""
        path = self.path / name
        write_atomic(path, data)
        return path
