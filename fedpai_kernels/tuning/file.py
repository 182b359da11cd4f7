# SPDX-License-Identifier: Apache-2.0
"""The file of measured figures: where it lies, what is in it, and when it counts.

    $XDG_CACHE_HOME (or ~/.cache)/fedpai/<key>.json      key: of the machine's facts, threads and versions included

FEDPAI_TUNING names another file, or is ``off``. A file that does not fit is never used: one that was named is an
error, one that was found is a warning, and the built-in figures hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from .figures import BUILT_IN, BreakEvens
from .machine import facts

__all__ = ["State", "TuningError", "break_evens", "default_path", "read", "state", "write"]

FORMAT = 2
VARIABLE = "FEDPAI_TUNING"
OFF = "off"
_DENSITIES = tuple(BUILT_IN.densities())


class TuningError(ValueError):
    """A file that holds no figures for this machine; the text names the file and says why."""


@dataclass(frozen=True)
class State:
    """Which figures hold, and why.

    Attributes:
        kind: "measured"; "built in" (there is no file); "off" (FEDPAI_TUNING says so); "unusable" (there is a file
            that cannot be used, and the built-in figures hold); "broken" (FEDPAI_TUNING names such a file).
        path: of the file that is, or would be, read; None if there is none.
        figures: what `sparsify_` would use; None where it would raise.
        problem: what is wrong with the file; empty if nothing is.
    """

    kind: Literal["measured", "built in", "off", "unusable", "broken"]
    path: Path | None
    figures: BreakEvens | None
    problem: str = ""


def default_path(machine: dict[str, str | int] | None = None) -> Path:
    """Where the figures of a machine are kept; by default of this one, with its threads as they are now."""
    machine = facts() if machine is None else machine
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of that variable wants a relative path ignored.
    folder = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~"), ".cache")
    return folder / "fedpai" / f"{key}.json"


def break_evens() -> BreakEvens:
    """The figures that hold now. Reads a small file at most; never measures.

    Raises:
        TuningError: FEDPAI_TUNING names a file that cannot be used.

    Warns:
        UserWarning: the file of this machine cannot be used, and the built-in figures hold.
    """
    found = state()
    if found.figures is None:
        raise TuningError(
            f"{VARIABLE}: {found.problem}; name a file that `fedpai tune` wrote here, or unset it"
        )
    if found.problem:
        warnings.warn(
            f"the built-in break-evens hold, because {found.problem}; `fedpai tune` writes the file anew",
            stacklevel=3,
        )
    return found.figures


def state() -> State:
    """As :func:`break_evens`, without raising or warning."""
    setting = os.environ.get(VARIABLE, "")
    if setting == OFF:
        return State("off", None, BUILT_IN)
    path = Path(setting) if setting else default_path()
    try:
        return State("measured", path, read(path))
    except FileNotFoundError:
        if not setting:
            return State("built in", path, BUILT_IN)
        return State("broken", path, None, f"there is no file {path}")
    except TuningError as error:
        if setting:
            return State("broken", path, None, str(error))
        return State("unusable", path, BUILT_IN, str(error))


def read(path: Path) -> BreakEvens:
    """The figures of a file.

    Raises:
        FileNotFoundError: there is none.
        TuningError: it cannot be read, is damaged, of another format, or was measured on another machine, with
            another number of threads, or with other versions.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TuningError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise TuningError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise TuningError(f"{path} has format {found!r}, expected {FORMAT}")
    _check_machine(path, content.get("machine"))
    densities = content.get("break_even")
    if not isinstance(densities, dict) or set(densities) != set(_DENSITIES):
        raise TuningError(f"{path} is damaged (break_even: expected the numbers {', '.join(_DENSITIES)})")
    for name, density in densities.items():
        if not _is_number(density) or not 0 <= density <= 1:
            raise TuningError(f"{path} is damaged (break_even: {name}: expected 0 to 1, got {density!r})")
    fan_in = content.get("full_fan_in")
    if type(fan_in) is not int or fan_in < 0:
        raise TuningError(f"{path} is damaged (full_fan_in: expected an int of at least 0, got {fan_in!r})")
    return BreakEvens(**densities, full_fan_in=fan_in, source="measured on this machine")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _check_machine(path: Path, machine: object) -> None:
    here = facts()
    if not isinstance(machine, dict):
        raise TuningError(f"{path} is damaged (machine: expected an object, got {machine!r})")
    other = [
        f"{name} {machine.get(name)!r}, here {value!r}"
        for name, value in here.items()
        if machine.get(name) != value
    ]
    if other:
        raise TuningError(f"{path} was measured elsewhere ({'; '.join(other)})")


def write(path: Path, figures: BreakEvens, samples: dict[str, Any]) -> None:
    """Writes figures of this machine, in one step: a reader sees the old file or the new one.

    Args:
        path: of the file; its folder is made.
        figures: what was measured.
        samples: what it follows from, for people.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "machine": facts(),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "break_even": {name: round(density, 4) for name, density in figures.densities().items()},
        "full_fan_in": figures.full_fan_in,
        "samples": samples,
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
