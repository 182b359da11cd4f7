# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash at any moment leaves the old content or the new, never half of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
"""Suffix of a file that is being written."""


class WriteError(OSError):
    """A file that could not be written, as on a full disk; what it held before is still there."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file: temporary file beside it, flushed to disk, renamed over it, folder flushed.

    Raises:
        WriteError: the old content, or none, is still there, and nothing beside it.
    """
    part = path.with_name(path.name + PART)
    with _named(path):
        try:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except OSError:
            if part.exists():  # half of it would take room that a full disk does not have
                part.unlink()
            raise
        flush_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends one line and flushes it to disk.

    Raises:
        WriteError: the line is missing, or cut off.
    """
    with _named(path), path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors of writing do not say which file they speak of."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


def flush_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
