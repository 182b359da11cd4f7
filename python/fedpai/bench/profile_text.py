# SPDX-License-Identifier: Apache-2.0
"""Profile rows for people: a bar of the whole step, its parts, its layers, and how far the sum can be trusted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from fedpai.bench.roofline_text import percent
from fedpai.bench.rows import Row
from fedpai.bench.step_text import mask_label
from fedpai.bench.table import Table, bar, digits, milliseconds

LEAST_COVERAGE, MOST_OVERHEAD = 0.95, 0.05

# A letter and a colour for each part of the bar.
_MARKS = {
    "conv forward": ("F", "bright_blue"),
    "conv input-grad": ("I", "blue"),
    "conv weight-grad": ("W", "cyan"),
    "conv backward": ("B", "bright_cyan"),
    "linear": ("L", "bright_magenta"),
    "norm forward": ("N", "bright_green"),
    "norm backward": ("n", "green"),
    "attention": ("T", "bright_white"),
    "residual add": ("R", "yellow"),
    "activation": ("A", "bright_yellow"),
    "pooling": ("P", "magenta"),
    "loss": ("X", "bright_red"),
    "optimiser": ("O", "red"),
    "Python": ("y", "white"),
}
_OTHERS = ("o", "bright_black")
_BAR_WIDTH, _SHARE_WIDTH = 100, 20


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each network and sparsity."""
    keys = dict.fromkeys((row["model"], row["sparsity"]) for row in rows)
    return [[row for row in rows if (row["model"], row["sparsity"]) == key] for key in keys]


def title(rows: Sequence[Row]) -> str:
    """What was profiled, and how long a step takes."""
    first = rows[0]
    step = first["step"]
    return (
        f"{first['model']}, {mask_label(first)}, structure {first['structure']}, batch {first['batch']}: "
        f"our step takes {digits(step['plain_ms'])} ms, "
        f"{digits(step['traced_ms'])} ms under the trace; medians of {step['samples']}"
    )


def part_table(rows: Sequence[Row]) -> Table:
    """One line per part, and their sum."""
    parts = [row for row in rows if row["layer"] is None]
    head = ["part", "share", "", "ms", "20-80 %", "GFLOP/s", "GB/s", "bound ms", "of the bound"]
    table = Table(head, left=2)
    for row in parts:
        remainder = " (remainder)" if row["counted"] == "remainder" else ""
        table.rows.append(
            [
                row["part"] + remainder,
                bar(row["share"], _SHARE_WIDTH),
                _percent(row["share"]),
                digits(row["median_ms"]),
                f"{digits(row['q20_ms'])}-{digits(row['q80_ms'])}",
                *_rates(row),
            ]
        )
    total = [row for row in parts if row["counted"] != "remainder"]
    share, time = sum(row["share"] for row in total), sum(row["median_ms"] for row in total)
    table.rows.append(["sum of the medians", "", _percent(share), digits(time), *["-"] * 5])
    return table


def _rates(row: Row) -> list[str]:
    """GFLOP/s, GB/s, bound, share of the bound; dashes where the part has no such work."""
    time = row["median_ms"]
    if not row.get("traffic_bytes") or time <= 0:
        return ["-"] * 4
    flop = row["useful_flop"]
    return [
        digits(flop / time / 1e6) if flop else "-",
        digits(row["traffic_bytes"] / time / 1e6),
        digits(row["bound_ms"]),
        percent(row["bound_ms"] / time),
    ]


def layer_table(rows: Sequence[Row]) -> Table:
    """Convolutions and linear layers, each with its directions."""
    mine = [row for row in rows if row["layer"] and row["part"].startswith(("conv", "linear"))]
    directions = dict.fromkeys(row["part"].partition(" ")[2] for row in mine)
    head = ["layer", "share", "", "ms", *(f"{name} ms" for name in directions), "GFLOP/s", "of the bound"]
    table = Table(head, left=2)
    for layer in dict.fromkeys(row["layer"] for row in mine):
        found = {row["part"].partition(" ")[2]: row for row in mine if row["layer"] == layer}
        time, share = (sum(row[name] for row in found.values()) for name in ("median_ms", "share"))
        flop, bound = (sum(row.get(name, 0) for row in found.values()) for name in ("useful_flop", "bound_ms"))
        table.rows.append(
            [
                layer,
                bar(share, _SHARE_WIDTH),
                _percent(share),
                digits(time),
                *(milliseconds(found[d]["median_ms"] if d in found else None) for d in directions),
                digits(flop / time / 1e6) if flop else "-",
                percent(bound / time) if bound else "-",
            ]
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---- the whole step as one bar --------------------------------------------------------------------------


def _mark(part: str) -> tuple[str, str]:
    for beginning, mark in _MARKS.items():
        if part.startswith(beginning):
            return mark
    return _OTHERS


def segments(rows: Sequence[Row], width: int = _BAR_WIDTH) -> list[tuple[str, str, float]]:
    """(letters, colour, share) from left to right, `width` letters together; small parts may get none."""
    shares: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["layer"] is None and row["counted"] != "remainder":
            mark = _mark(row["part"])
            shares[mark] = shares.get(mark, 0.0) + row["share"]
    total, done, drawn = sum(shares.values()), 0.0, 0
    found = []
    for (letter, colour), share in shares.items():
        done += share
        end = round(width * done / total)
        found.append((letter * (end - drawn), colour, share))
        drawn = end
    return found


def legend(rows: Sequence[Row]) -> str:
    """The letters of the bar."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["layer"] is None and row["counted"] != "remainder":
            names.setdefault(_mark(row["part"])[0], []).append(row["part"])
    return "; ".join(f"{letter} {', '.join(parts)}" for letter, parts in names.items())


def show_bar(rows: Sequence[Row]) -> None:
    """Prints it, in colour where `rich` is installed and somebody looks."""
    found = segments(rows)
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.text import Text

        text = Text()
        for letters, colour, _ in found:
            text.append(letters, style=f"black on {colour}")
        Console().print(text)
    else:
        print("".join(letters for letters, _, _ in found))
    print(legend(rows))


# ---- what to make of it ---------------------------------------------------------------------------------


def remarks(rows: Sequence[Row]) -> list[str]:
    """How much is accounted for, what the trace costs, and what does not count."""
    step = rows[0]["step"]
    gaps = step["coverage"] - step["in_operations"]
    lines = [
        f"accounted for: {_percent(step['coverage'])} of the step's clock, {_percent(step['in_operations'])} in "
        f"operations and {_percent(gaps)} between them, as the trace shows it",
        f"the trace makes the step {100 * step['overhead']:+.1f} % slower (median over pairs with and without)",
    ]
    if step["coverage"] < LEAST_COVERAGE:
        lines.append(f"WARNING: less than {percent(LEAST_COVERAGE)} is accounted for")
    if abs(step["overhead"]) > MOST_OVERHEAD:
        lines.append("WARNING: with such a difference, the parts tell little of the step without the trace")
    others = [row for row in rows if row["part"] == "other operations" and row["layer"]]
    if others:
        names = (f"{row['layer']} {digits(row['median_ms'])} ms" for row in others)
        lines.append(f"other operations: {', '.join(names)}")
    return lines
