# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the time of a whole training step: a table, and one plot a network.

    python lab/006_time_masks/pareto.py

Accuracies are those of `trials.py` at full width (rows.jsonl), times those of `fedpai bench step` under the same masks
(benchmarks/results/step.jsonl), of the machine and number of threads that has most of them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedpai.bench.rows import median_ms, read
from fedpai.bench.table import Table, digits, ratio
from fedpai.report.charts import Series, line_chart, standalone

HERE = Path(__file__).parent
STEPS = HERE.parents[1] / "benchmarks" / "results" / "step.jsonl"
OWN, CHOSEN = "GraSP's own ranking, and ERK", "layers chosen for time"


def accuracies() -> dict[tuple[str, str], list[float]]:
    """(network, form) -> per cent, one a seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in (HERE / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["width"] == 1 and row["sparsity"] == 0.98 and (row["images"], row["epochs"]) == (6000, 4):
            form = row["form"].replace("time:1.25", "time")
            found.setdefault((row["model"], form), {})[row["seed"]] = row["accuracy"]
    return {key: list(seeds.values()) for key, seeds in found.items()}


def steps() -> tuple[str, dict[tuple[str, str], Any]]:
    """The setting that the times are of, and (network, form) -> row."""
    rows = [row for row in read([STEPS]) if row["sparsity"] == 0.98 and row["structure"] == "weight"]
    settings = Counter((row["machine"]["cpu"], row["threads"], row["batch"], row["isa"]) for row in rows)
    best, _ = settings.most_common(1)[0]
    mine = [r for r in rows if (r["machine"]["cpu"], r["threads"], r["batch"], r["isa"]) == best]
    named = {(row["model"], row["mask"] if "@" in row["mask"] else f"{row['mask']}@global"): row for row in mine}
    return f"{best[0]}, {best[3]}, {best[1]} threads, batch {best[2]}", named


def main() -> None:
    trained, (setting, timed) = accuracies(), steps()
    print(f"{setting}\n")
    for model in sorted({model for model, _ in trained}):
        head = ["masks", "ours, ms/image", "over dense torch", "accuracy, %", "±", "seeds", "over grasp@global"]
        table, points = Table(head), []
        own = fmean(trained[model, "grasp@global"])
        for (name, form), found in trained.items():
            row = timed.get((model, form))
            if name != model or row is None:
                continue
            spread = stdev(found) if len(found) > 1 else None
            ms = (median_ms(row, "ours") or 0) / row["batch"]
            cells = [digits(ms), ratio(row["speedup"]["dense"]), f"{fmean(found):.2f}", "-" if spread is None else f"{spread:.2f}"]
            table.rows.append([form, *cells, str(len(found)), f"{fmean(found) - own:+.2f}"])
            points.append((ms, fmean(found), spread or 0.0, form))
        table.rows.sort(key=lambda cells: float(cells[1]))
        print(f"{model}\n\n{table.to_markdown()}\n")
        series = []
        for label, style in ((OWN, "s1"), (CHOSEN, "s0")):
            chosen = sorted(point for point in points if ("@time" in point[3]) == (label == CHOSEN))
            series.append(Series(label, [p[:2] for p in chosen], style, spread=[p[2] for p in chosen]))
        chart = line_chart(series, x_label=f"{model}, ms of a step per image", y_label="test accuracy, %", from_zero=False)
        (HERE / f"pareto-{model}.svg").write_text(standalone(chart, [(s.label, s.style) for s in series]))


if __name__ == "__main__":
    main()
