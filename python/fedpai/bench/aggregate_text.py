# SPDX-License-Identifier: Apache-2.0
"""Aggregation rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from fedpai.bench.rows import CACHES, Row, median_ms
from fedpai.bench.step_text import mask_label
from fedpai.bench.table import Table, digits, ratio


def aggregate_table(rows: Sequence[Row]) -> Table:
    """Every contender in each of its variants, and the copy; the best variant of each is marked."""
    head = ["model", "mask", "form", "contender", "variant", "ms", "20-80 %", "ours is"]
    table = Table(head, left=5, title=f"merging {rows[0]['clients']} clients")
    for row in rows:
        ours = median_ms(row, "ours")
        what = [row["model"], mask_label(row), row["form"]]
        copy = {name: numbers for name, numbers in row["copy"].items() if name != "bytes"}
        best_copy = min(copy, key=lambda name: copy[name]["median_ms"])
        results = {**row["results"], "copy": {"status": "ok", "best": best_copy, "variants": copy}}
        for contender, result in results.items():
            if result["status"] != "ok":
                table.rows.append([*what, contender, result["status"], "-", "-", "-"])
                continue
            for variant, numbers in result["variants"].items():
                faster = numbers["median_ms"] / ours if ours and contender in row["speedup"] else None
                table.rows.append(
                    [
                        *what,
                        contender,
                        variant + (" *" if variant == result["best"] else ""),
                        digits(numbers["median_ms"]),
                        f"{digits(numbers['q20_ms'])}-{digits(numbers['q80_ms'])}",
                        ratio(faster),
                    ]
                )
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the columns are, and how near to a copy ours is."""
    lines = [
        "ratios are of medians; * marks a contender's best variant, the one that counts",
        f"state_dict: {rows[0]['distinct']} state_dicts take turns as those of all clients; copy: all clients' values "
        "into one buffer",
    ]
    if "device" in rows[0]:
        lines.append("values, weights and what is made once a set of masks lie on the device before a call is timed")
    if rows[0].get("caches") == CACHES[True]:
        lines.append("caches are emptied before each sample")
    for row in rows:
        lines.append(
            f"{row['model']}, {mask_label(row)}, {row['form']}: {row['values'] / 1e6:.1f} million values into "
            f"{row['union'] / 1e6:.2f} million weights; {100 * row['copy_share']:.0f} % of the bandwidth of the copy"
        )
        for name, result in row["results"].items():
            if result.get("reason"):
                lines.append(f"{row['model']}, {mask_label(row)}, {row['form']}: {name}: {result['reason']}")
    return lines
