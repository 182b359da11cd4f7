# SPDX-License-Identifier: Apache-2.0
"""The file of break-evens: what is in it, and when it counts (:mod:`fedpai_kernels.tuning.store`: where it lies).

FEDPAI_TUNING names another file, or is ``off``. A file that does not fit is never used: one that was named is an
error, one that was found is a warning, and the built-in figures hold.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .figures import BUILT_IN, BreakEvens
from .machine import facts
from .store import OFF, VARIABLE, TuningError, path_of, read_object, write_object

__all__ = ["State", "TuningError", "break_evens", "default_path", "read", "state", "write"]

FORMAT = 2
_DENSITIES = tuple(BUILT_IN.densities())


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
    return path_of(facts() if machine is None else machine)


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
    content = read_object(path, FORMAT, facts())
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
        "break_even": {name: round(density, 4) for name, density in figures.densities().items()},
        "full_fan_in": figures.full_fan_in,
        "samples": samples,
    }
    write_object(path, FORMAT, facts(), content)
