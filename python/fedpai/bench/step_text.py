# SPDX-License-Identifier: Apache-2.0
"""Step rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from fedpai.bench.rows import Row, best_of
from fedpai.bench.table import Table, digits, ratio


def step_table(rows: Sequence[Row]) -> Table:
    """Every contender in each of its variants; the best variant of each is marked."""
    head = ["model", "mask", "structure", "contender", "variant", "ms/step", "20-80 %", "first", "ms/image", "ours is"]
    table = Table(head, left=5, title=f"whole training step, batch {rows[0]['batch']}")
    for row in rows:
        ours = best_of(row, "ours")
        what = [row["model"], mask_label(row), row["structure"]]
        for name, result in row["results"].items():
            if result["status"] != "ok":
                table.rows.append([*what, name, result["status"], *["-"] * 5])
                continue
            for variant, numbers in result["variants"].items():
                faster = None if ours is None or name == "ours" else numbers["median_ms"] / ours["median_ms"]
                best = " *" if variant == result["best"] and len(result["variants"]) > 1 else ""
                table.rows.append(
                    [
                        *what,
                        name,
                        variant + best,
                        digits(numbers["median_ms"]),
                        f"{digits(numbers['q20_ms'])}-{digits(numbers['q80_ms'])}",
                        digits(numbers["first_step_ms"]),
                        digits(numbers["median_ms"] / row["batch"]),
                        ratio(faster),
                    ]
                )
    return table


def mask_label(row: Row) -> str:
    """E.g. ``grasp 98 %``."""
    return f"{row['mask']} {100 * row['sparsity']:g} %"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Share of the arithmetic, how layers compute, and who is missing or wrong."""
    lines = [
        "ratios are of medians; * marks a contender's best variant, the one that counts; first: the first step, ms"
    ]
    for row in rows:
        layers = ", ".join(f"{count} {kernel}" for kernel, count in row["layers"].items())
        scored = f", scored on {row['mask_data']}" if row["mask_data"] else ""
        lines.append(
            f"{row['model']}, {mask_label(row)}{scored}: {100 * row['mac_share']:.1f} % of the dense multiply-adds; "
            f"layers: {layers}"
        )
        ours = best_of(row, "ours")
        if ours is not None and "convert_ms" in ours:
            lines.append(
                f"{row['model']}, {mask_label(row)}: converted in {digits(ours['convert_ms'])} ms, first step "
                f"{digits(max(0.0, ours['first_step_ms'] - ours['median_ms']))} ms longer than the median"
            )
        for name, result in row["results"].items():
            if result.get("reason"):
                lines.append(f"{row['model']}, {mask_label(row)}: {name}: {result['reason']}")
    return lines
