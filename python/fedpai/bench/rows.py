# SPDX-License-Identifier: Apache-2.0
"""Result rows: one JSON object a line, complete in itself, so that files can be appended to and joined.

Every row has ``schema``, ``row`` ("layer", "step", "profile", "memory" or "aggregate"), ``time``, ``machine``,
``software``, ``commit``, ``threads``, ``isa``, ``machine_model``, ``model``, ``mask``, ``structure`` (of the masks, as
it was asked for; rows without it are read as "weight"), ``density``, ``batch``. Those of layers, steps and aggregation
have ``results``: for each contender

    {"status": "ok", "best": variant, "variants": {variant: {"median_ms": ..., "q20_ms": ..., ...}}}
    {"status": "wrong" | "unavailable", "reason": text}

and ``speedup``: {rival: its best variant's median over ours}. In a step row a variant has ``first_step_ms`` as well,
and ours ``convert_ms``, what `sparsify_` took. A profile row is one part of our step, of one layer or
(``layer`` null) of all: ``counted`` says whether it is an "operation", a "gap" between operations, or the "remainder"
that the trace does not show, and ``step`` what holds for the whole. A layer row has ``structure_found``, what
:func:`fedpai_kernels.structure.describe` says of its mask. A layer, step or aggregate row that was measured on a GPU
has ``device``, as written in ``device.py``, the compute capability as ``isa``, an empty ``machine_model`` and null
bounds. A memory row has ``peaks``: {contender: {variant: {"peak_bytes": ..., "start_bytes": ..., ...}}}, as written in
``memory.py``. An aggregate row has no ``batch`` (null), but ``copy`` and ``copy_share``, as written in
``aggregate.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedpai.bench.errors import BenchError
from fedpai.bench.timing import Timing

SCHEMA = 1
CACHES = {False: "as the others leave them", True: "cold"}
"""What ``caches`` says, by whether they were emptied before each sample. Rows without the field were not."""
Row = dict[str, Any]

_COMMON = (
    *("schema", "row", "time", "machine", "software", "commit", "threads", "isa", "machine_model"),
    *("model", "mask", "density", "batch"),
)
_COMPARED = ("results", "speedup")
_OWN = {
    "layer": (
        *_COMPARED,
        *("layer", "label", "count", "case", "target_density", "nnz", "direction", "caches"),
        *("useful_flop", "dense_flop", "bound_ms", "choice", "setup"),
    ),
    "step": (*_COMPARED, "sparsity", "mac_share", "input", "mask_data", "losses", "layers"),
    "profile": (
        *("sparsity", "mac_share", "input", "mask_data", "step", "part", "layer", "counted"),
        *("median_ms", "q20_ms", "q80_ms", "share"),
    ),
    "aggregate": (
        *_COMPARED,
        *("sparsity", "mask_data", "form", "clients", "distinct", "values", "union", "bytes", "copy", "copy_share"),
    ),
    "memory": ("sparsity", "mac_share", "input", "mask_data", "steps", "method", "peaks"),
}


@dataclass(frozen=True)
class Result:
    """What one contender did: timings by variant, or why there are none."""

    timings: Mapping[str, Timing]
    details: Mapping[str, Mapping[str, Any]]
    status: str = "ok"
    reason: str = ""

    @property
    def best(self) -> str | None:
        """The variant with the smallest median."""
        return min(self.timings, key=lambda variant: self.timings[variant].median, default=None)

    def to_json(self) -> Row:
        """As in a row."""
        if self.best is None:
            return {"status": self.status, "reason": self.reason}
        variants = {
            variant: {**timing.to_json(), **self.details.get(variant, {})}
            for variant, timing in self.timings.items()
        }
        found: Row = {"status": "ok", "best": self.best, "variants": variants}
        return {**found, "reason": self.reason} if self.reason else found


def common(kind: str, identity: Mapping[str, Any], machine_model: Mapping[str, Any]) -> Row:
    """What every row of a run starts with."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "row": kind, "time": now, **identity, "machine_model": dict(machine_model)}


def results_of(found: Mapping[str, Result]) -> Row:
    """The fields ``results`` and ``speedup``."""
    results = {name: result.to_json() for name, result in found.items()}
    ours = median_ms({"results": results}, "ours")
    speedup = {}
    for name in results:
        theirs = median_ms({"results": results}, name)
        if name != "ours" and ours is not None and theirs is not None:
            speedup[name] = round(theirs / ours, 4)
    return {"results": results, "speedup": speedup}


def median_ms(row: Mapping[str, Any], contender: str) -> float | None:
    """Median of a contender's best variant, or None where it has none."""
    best = best_of(row, contender)
    return None if best is None else float(best["median_ms"])


def best_of(row: Mapping[str, Any], contender: str) -> Row | None:
    """The numbers of a contender's best variant, or None."""
    result = row["results"].get(contender)
    if result is None or result["status"] != "ok":
        return None
    best: Row = result["variants"][result["best"]]
    return best


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers, at least one."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


# ---- files ----------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Raises a BenchError now rather than after the measurement."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise BenchError(f"--json: cannot write {path} ({error.strerror})") from error


def append(path: Path, row: Row) -> None:
    """Adds a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


def read(paths: Iterable[Path]) -> Iterator[Row]:
    """Checked rows of files, in order.

    Raises:
        BenchError: a file that cannot be read, or a line that is no row, with its number.
    """
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"cannot read {path} ({error})") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                problem = check(row)
            except json.JSONDecodeError as error:
                problem = str(error)
            if problem:
                raise BenchError(f"{path}, line {number}: {problem}")
            yield {"structure": "weight", **row}


def check(row: object) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "no JSON object"
    if row.get("schema") != SCHEMA or row.get("row") not in _OWN:
        return f"schema {row.get('schema')!r}, row {row.get('row')!r}: expected {SCHEMA} and one of {sorted(_OWN)}"
    missing = [name for name in (*_COMMON, *_OWN[row["row"]]) if name not in row]
    if missing:
        return f"fields {', '.join(missing)} are missing"
    for name, variants in row.get("peaks", {}).items():
        if wrong := [variant for variant, numbers in variants.items() if numbers.get("peak_bytes", 0) <= 0]:
            return f"peaks: {name}, {', '.join(wrong)}: no bytes"
    for name, result in row.get("results", {}).items():
        if result.get("status") == "ok":
            if result.get("best") not in result.get("variants", {}):
                return f"results: {name} names no best variant"
            for variant, numbers in result["variants"].items():
                order = [numbers.get(key) for key in ("best_ms", "q20_ms", "median_ms", "q80_ms")]
                if None in order or order != sorted(order) or order[0] <= 0:
                    return f"results: {name}, {variant}: quantiles {order} are missing or out of order"
        elif result.get("status") not in ("wrong", "unavailable") or not result.get("reason"):
            return f"results: {name} has status {result.get('status')!r} without a reason"
    return ""
