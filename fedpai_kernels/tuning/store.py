# SPDX-License-Identifier: Apache-2.0
"""Files of measured figures: JSON objects that say what they were measured on, one file for each such set of facts.

    $XDG_CACHE_HOME (or ~/.cache)/fedpai/<key>.json      key: of the facts, versions included

They are written in one step: a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["OFF", "VARIABLE", "Facts", "TuningError", "path_of", "read_object", "write_object"]

VARIABLE = "FEDPAI_TUNING"
OFF = "off"

Facts = Mapping[str, str | int]


class TuningError(ValueError):
    """A file that holds no figures for this machine; the text names the file and says why."""


def path_of(machine: Facts) -> Path:
    """Where the figures that were measured under these facts are kept."""
    key = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of that variable wants a relative path ignored.
    folder = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~"), ".cache")
    return folder / "fedpai" / f"{key}.json"


def read_object(path: Path, format_number: int, here: Facts) -> dict[str, Any]:
    """What a file holds, if it is of this format and was measured under these facts.

    Raises:
        FileNotFoundError: there is none.
        TuningError: it cannot be read, is damaged, of another format, or was measured elsewhere.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TuningError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise TuningError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != format_number:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TuningError(f"{path} has format {found!r}, expected {format_number}")
    machine = content.get("machine")
    if not isinstance(machine, dict):
        raise TuningError(f"{path} is damaged (machine: expected an object, got {machine!r})")
    other = [
        f"{name} {machine.get(name)!r}, here {value!r}"
        for name, value in here.items()
        if machine.get(name) != value
    ]
    if other:
        raise TuningError(f"{path} was measured elsewhere ({'; '.join(other)})")
    return content


def write_object(path: Path, format_number: int, here: Facts, figures: Mapping[str, Any]) -> None:
    """Writes figures measured under these facts.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "format": format_number,
        "machine": dict(here),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
