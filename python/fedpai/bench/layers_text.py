# SPDX-License-Identifier: Apache-2.0
"""Layer rows for people: a table, a summary, and the rows that ours does not win."""

from __future__ import annotations

from collections.abc import Sequence

from fedpai.bench.rows import Row, best_of, geometric_mean, median_ms
from fedpai.bench.table import Table, digits, milliseconds, ratio

FIRST_LAYER = (
    "input-grad, backward and train include the input gradient in the first layer too, where training does not "
    "need it."
)


def detail_tables(rows: Sequence[Row]) -> list[Table]:
    """Every row, with ours first and each rival's best variant after it; one table per network."""
    models = dict.fromkeys(row["model"] for row in rows)
    return [_detail_table(model, [row for row in rows if row["model"] == model]) for model in models]


def _detail_table(model: str, rows: Sequence[Row]) -> Table:
    rivals = [name for name in rows[0]["results"] if name != "ours"]
    head = ["layer", "sizes", "structure", "n", "density", "direction", "ours ms", "20-80 %"]
    head += [f"{name} ms" for name in rivals] + [f"/ {name}" for name in rivals]
    head += ["bound ms", "GFLOP/s", "as dense", "choice"]
    title = f"{model}, {rows[0]['mask']} masks, batch {rows[0]['batch']}"
    table = Table(head, left=3, title=title)
    order = {name: number for number, name in enumerate(dict.fromkeys(row["layer"] for row in rows))}
    for row in sorted(rows, key=lambda r: (order[r["layer"]], -r["target_density"])):
        ours = best_of(row, "ours")
        times = [milliseconds(median_ms(row, name)) for name in rivals]
        speedups = [_speedup(row, name) for name in rivals]
        rates = ["-", "-"]
        if ours is not None:
            rates = [digits(row[key] / ours["median_ms"] / 1e6) for key in ("useful_flop", "dense_flop")]
        table.rows.append(
            [
                row["layer"],
                row["label"],
                structure_of(row),
                str(row["count"]),
                kept(row),
                row["direction"],
                "-" if ours is None else milliseconds(ours["median_ms"]),
                "-" if ours is None else f"{digits(ours['q20_ms'])}-{digits(ours['q80_ms'])}",
                *times,
                *speedups,
                milliseconds(row["bound_ms"]),
                *rates,
                row["choice"],
            ]
        )
    return table


def kept(row: Row) -> str:
    """Density of a layer: as asked for where masks are uniform, else what the criterion gave it."""
    return f"{row['target_density'] if row['mask'] == 'uniform' else round(row['density'], 4):g}"


def structure_of(row: Row) -> str:
    """Of a layer's mask: as found in it, or in older rows as asked for."""
    return str(row.get("structure_found", row["structure"]))


def _speedup(row: Row, rival: str) -> str:
    result = row["results"][rival]
    return result["status"].upper() if result["status"] == "wrong" else ratio(row["speedup"].get(rival))


def summary_table(rows: Sequence[Row]) -> Table:
    """Per network, density and direction: geometric mean and least speed-up over the layers, and the sum of
    all layers' times (each times its count).
    """
    rivals = [name for name in rows[0]["results"] if name != "ours"]
    head = ["model", "density", "direction", "layers", "ours ms"]
    for name in rivals:
        head += [f"{name}: mean", "least", "sum"]
    table = Table(head, left=1)
    keys = dict.fromkeys((row["model"], row["target_density"], row["direction"]) for row in rows)
    for model, density, direction in keys:
        mine = [
            r
            for r in rows
            if (r["model"], r["target_density"], r["direction"]) == (model, density, direction)
        ]
        cells = [model, f"{density:g}", direction, str(len(mine)), milliseconds(_total(mine, "ours"))]
        for name in rivals:
            ratios = [row["speedup"][name] for row in mine if name in row["speedup"]]
            if not ratios:
                cells += ["-", "-", "-"]
                continue
            both = [row for row in mine if name in row["speedup"]]
            theirs, ours = _total(both, name), _total(both, "ours")
            total = theirs / ours if theirs and ours else None
            cells += [ratio(geometric_mean(ratios)), ratio(min(ratios)), ratio(total)]
        table.rows.append(cells)
    return table


def _total(rows: Sequence[Row], name: str) -> float | None:
    times = [(median_ms(row, name), row["count"]) for row in rows]
    if not times or any(value is None for value, _ in times):
        return None
    return sum(value * count for value, count in times if value is not None)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the tables do not show: slower rows, rivals that are missing or wrong, how the first layer is
    measured.
    """
    lines = []
    for row in rows:
        for name, value in row["speedup"].items():
            if value < 1:
                chosen = "" if row["choice"] == "sparse" else "; a conversion keeps this layer dense"
                lines.append(
                    f"slower than {name}: {row['model']} {row['layer']} ({row['label']}), density "
                    f"{digits(row['density'])}, {row['direction']}: {ratio(value)}{chosen}"
                )
    for name in rows[0]["results"]:
        reasons: dict[str, set[str]] = {}
        for row in rows:
            result = row["results"][name]
            if result.get("reason"):
                reasons.setdefault(f"{result['status']}: {result['reason']}", set()).add(row["layer"])
        for reason, layers in reasons.items():
            where = (
                ""
                if len(layers) == len({row["layer"] for row in rows})
                else f" ({', '.join(sorted(layers))})"
            )
            lines.append(f"{name} {reason}{where}")
    return [*lines, FIRST_LAYER]
