# SPDX-License-Identifier: Apache-2.0
"""How near each layer comes to its bound: a table with bars, and the medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fedpai.bench.layers_text import kept
from fedpai.bench.rows import Row, median_ms
from fedpai.bench.table import Table, bar, digits, milliseconds

_BAR = 20


def roofline_tables(rows: Sequence[Row]) -> list[Table]:
    """Every row that has both floors; one table per network."""
    models = dict.fromkeys(row["model"] for row in rows if "roofline" in row)
    return [_table(model, [r for r in rows if r["model"] == model and "roofline" in r]) for model in models]


def _table(model: str, rows: Sequence[Row]) -> Table:
    head = ["layer", "sizes", "density", "direction", "of the bound", "", "ours ms", "bound ms", "bound by"]
    head += ["loads ms", "memory ms", "GFLOP/s", "FLOP/byte"]
    table = Table(head, left=5, title=f"{model}, {rows[0]['mask']} masks: share of the roofline's bound")
    order = {name: number for number, name in enumerate(dict.fromkeys(row["layer"] for row in rows))}
    for row in sorted(rows, key=lambda r: (order[r["layer"]], -r["target_density"])):
        ours, found, roofline = median_ms(row, "ours"), share(row), row["roofline"]
        table.rows.append(
            [
                row["layer"],
                row["label"],
                kept(row),
                row["direction"],
                "" if found is None else bar(found, _BAR),
                "-" if found is None else percent(found),
                milliseconds(ours),
                milliseconds(row["bound_ms"]),
                roofline["by"],
                milliseconds(roofline["loads_ms"]),
                milliseconds(roofline["memory_ms"]),
                "-" if ours is None else digits(row["useful_flop"] / ours / 1e6),
                digits(row["useful_flop"] / roofline["traffic_bytes"]),
            ]
        )
    return table


def share(row: Row) -> float | None:
    """Bound over our median; None where ours has none."""
    ours = median_ms(row, "ours")
    return None if ours is None else row["bound_ms"] / ours


def percent(value: float) -> str:
    """E.g. ``38 %``."""
    return f"{100 * value:.0f} %"


def summary_table(rows: Sequence[Row]) -> Table:
    """Per network, density and direction: the median over the layers, the extremes, how many layers which floor
    binds, and all layers together, each times its count.
    """
    head = ["model", "density", "direction", "layers", "median", "", "least", "most"]
    head += ["all layers", "bound by loads", "by memory"]
    table = Table(head, left=1, title="share of the bound")
    rows = [row for row in rows if "roofline" in row]
    keys = dict.fromkeys((row["model"], row["target_density"], row["direction"]) for row in rows)
    for key in keys:
        mine = [r for r in rows if (r["model"], r["target_density"], r["direction"]) == key]
        both = [(row, found) for row in mine if (found := share(row)) is not None]
        if not both:
            continue
        shares = [found for _, found in both]
        bound = sum(row["bound_ms"] * row["count"] for row, _ in both)
        ours = sum(row["bound_ms"] / found * row["count"] for row, found in both)
        loads = sum(row["roofline"]["by"] == "loads" for row, _ in both)
        middle = median(shares)
        table.rows.append(
            [
                key[0],
                f"{key[1]:g}",
                key[2],
                str(len(both)),
                bar(middle, _BAR),
                *(percent(value) for value in (middle, min(shares), max(shares), bound / ours)),
                str(loads),
                str(len(both) - loads),
            ]
        )
    return table
