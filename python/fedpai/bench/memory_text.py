# SPDX-License-Identifier: Apache-2.0
"""Memory rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from fedpai.bench.memory_child import MAXRSS, NOT_RESET, RESET
from fedpai.bench.rows import Row
from fedpai.bench.step_text import mask_label
from fedpai.bench.table import Table, digits

_METHODS = {
    RESET: "the kernel's high-water mark (VmHWM), reset before the network was made",
    NOT_RESET: "the kernel's high-water mark (VmHWM), which could not be reset: a peak that importing had reached "
    "before is in it",
    MAXRSS: "getrusage's ru_maxrss, which cannot be reset: growth below a peak that importing had reached is not seen",
}


def memory_table(rows: Sequence[Row]) -> Table:
    """Every contender in each of its variants."""
    head = ["model", "mask", "structure", "contender", "variant", "peak MB", "of dense", "live MB"]
    title = f"memory of training, batch {rows[0]['batch']}, {rows[0]['steps']} steps"
    table = Table(head, left=5, title=title)
    for row in rows:
        for name, variants in row["peaks"].items():
            for variant, numbers in variants.items():
                share, live = numbers.get("of_dense"), numbers.get("peak_live_bytes")
                table.rows.append(
                    [
                        row["model"],
                        mask_label(row),
                        row["structure"],
                        name,
                        variant,
                        digits(numbers["peak_bytes"] / 1e6),
                        "-" if share is None else f"{100 * share:.1f} %",
                        "-" if live is None else digits(live / 1e6),
                    ]
                )
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the columns are, and how they were read."""
    methods = dict.fromkeys(name for row in rows for name in row["method"].split("; "))
    return [
        "peak: growth of the resident memory over what the process had before the network was made; 1 MB is 10^6 bytes",
        "of dense: of dense torch in contiguous tensors; live: the most that fedpai_kernels.memory_stats() has counted "
        "as live, with what was reserved and never touched",
        *(f"read from {_METHODS[name]}" for name in methods),
    ]
