# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash at any moment leaves the old content or the new, never half of it."""

from __future__ import annotations

import os
from pathlib import Path

PART = ".part"
"""Suffix of a file that is being written."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file: temporary file beside it, flushed to disk, renamed over it, folder flushed."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    flush_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends one line and flushes it to disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
