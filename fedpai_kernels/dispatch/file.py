# SPDX-License-Identifier: Apache-2.0
"""The file of a device's timings: microseconds of each candidate for each layer that was measured there.

It lies where the break-evens of processors lie (:mod:`fedpai_kernels.tuning.store`), one for each device, capability
and set of versions. One that does not fit is never used: a warning says so, and the next measurement writes it anew.
FEDPAI_TUNING=off keeps timings in memory only.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..cuda.library import INTERFACE
from ..tuning.store import OFF, VARIABLE, Facts, TuningError, path_of, read_object, write_object

FORMAT = 1

Times = Mapping[str, float]
"""Microseconds, by the name of the candidate."""


def device_facts(device: torch.device) -> dict[str, str | int]:
    """What a timing depends on besides the layer."""
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": str(properties.name),
        "capability": f"{properties.major}.{properties.minor}",
        "torch": str(torch.__version__),
        "cudnn": int(torch.backends.cudnn.version() or 0),
        "triton": triton,
        "kernels": _C.__version__,
        "interface": INTERFACE,
    }


class TimesFile:
    """What was measured on each device, in memory and in the device's file.

    Args:
        facts: of a device; :func:`device_facts`, or a test's.
    """

    def __init__(self, facts: Callable[[torch.device], Facts] = device_facts) -> None:
        self._facts = facts
        self._read: dict[Path, dict[str, Times]] = {}
        self._lock = threading.Lock()

    def get(self, device: torch.device, layer: str) -> Times | None:
        """The timings of a layer, if there are any.

        Warns:
            UserWarning: the device's file cannot be used.
        """
        if os.environ.get(VARIABLE) == OFF:
            return None
        machine = self._facts(device)
        path = path_of(machine)
        with self._lock:
            if path not in self._read:
                self._read[path] = _usable(path, machine)
            return self._read[path].get(layer)

    def put(self, device: torch.device, layer: str, times: Times) -> None:
        """Adds timings, beside those that other processes have added in the meantime.

        Warns:
            UserWarning: the file cannot be written; the timings serve this process.
        """
        if os.environ.get(VARIABLE) == OFF:
            return
        machine = self._facts(device)
        path = path_of(machine)
        with self._lock:
            try:
                written = _layers(read_object(path, FORMAT, machine), path)
            except (FileNotFoundError, TuningError):  # said when it was read
                written = {}
            every = self._read[path] = {**written, **self._read.get(path, {}), layer: dict(times)}
            try:
                write_object(path, FORMAT, machine, {"layers": every})
            except OSError as error:
                problem = f"timings serve this process only, because {path} cannot be written ({error})"
                warnings.warn(problem, stacklevel=2)


def _usable(path: Path, machine: Facts) -> dict[str, Times]:
    try:
        return _layers(read_object(path, FORMAT, machine), path)
    except FileNotFoundError:
        return {}
    except TuningError as error:
        warnings.warn(f"layers are measured again, because {error}", stacklevel=2)
        return {}


def _layers(content: Mapping[str, Any], path: Path) -> dict[str, Times]:
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise TuningError(f"{path} is damaged (layers: expected an object, got {layers!r})")
    for layer, times in layers.items():
        if not isinstance(times, dict) or not times or not all(map(_is_time, times.values())):
            raise TuningError(f"{path} is damaged ({layer}: expected microseconds by candidate, got {times!r})")
    return layers


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
