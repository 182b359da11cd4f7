# SPDX-License-Identifier: Apache-2.0
"""Renders the committed result rows into the documents: python benchmarks/tables.py [--check]

Between ``<!-- results:begin -->`` and ``<!-- results:end -->`` of the README go the whole steps;
``docs/benchmarking.md`` gets a summary of the layers and every layer besides. Of rows that measure the same thing on
the same machine, the newest counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpai.bench import BenchError
from fedpai.bench.layers_text import kept, structure_of
from fedpai.bench.rows import CACHES, Row, best_of, geometric_mean, median_ms, read
from fedpai.bench.step_text import mask_label
from fedpai.bench.table import Table, digits, milliseconds, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SHOWN = ("step", "layer", "aggregate")
FIRST = ("uniform", "grasp", "grasp@time")
"""Masks of whole steps in the README, by single weights; all others are in docs/benchmarking.md."""
RIVALS = {"dense": "dense torch", "sparseprop": "SparseProp"}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the documents, or with ``--check`` says whether they are up to date (exit code 1 if not)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a document is out of date"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of *.jsonl files"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ are"
    )
    arguments = parser.parse_args(argv)
    try:
        rows = newest([row for row in read(sorted(arguments.results.glob("*.jsonl"))) if row["row"] in SHOWN])
        old = {path: path.read_text(encoding="utf-8") for path in documents(arguments.root)}
        steps = [row for row in rows if on_first_screen(row)]
        new = {
            path: replaced(path, text, section(steps if path.name == "README.md" else rows))
            for path, text in old.items()
        }
    except (BenchError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    stale = [path for path in new if new[path] != old[path]]
    for path in stale:
        if arguments.check:
            print(f"{path} is out of date: run python benchmarks/tables.py", file=sys.stderr)
        else:
            path.write_text(new[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if arguments.check and stale else 0


def on_first_screen(row: Row) -> bool:
    """Whether the README has room for a row."""
    return row["row"] == "step" and row["mask"] in FIRST and row["structure"] == "weight"


def documents(root: Path) -> tuple[Path, Path]:
    """Those that hold tables."""
    return root / "README.md", root / "docs" / "benchmarking.md"


def replaced(path: Path, text: str, content: str) -> str:
    """A document with other content between its markers.

    Raises:
        BenchError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise BenchError(f"{path}: expected {BEGIN} and after it {END}, once each")
    return f"{before}{BEGIN}\n{content}{END}{after}"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last of the rows that measure the same thing on the same machine with as many threads."""
    found: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda row: str(row["time"])):
        what = (
            "row",
            "model",
            "mask",
            "structure",
            "target_density",
            "sparsity",
            "batch",
            "layer",
            "direction",
            "form",
            "threads",
            "isa",
        )
        device = row.get("device", {})
        place = (row["machine"]["cpu"], device.get("name"), device.get("precision"), _caches(row))
        key = (*place, *(row.get(name) for name in what))
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def section(rows: Sequence[Row]) -> str:
    """Markdown for all machines; empty without rows."""
    parts: list[str] = []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        mine = [row for row in rows if _setting(row) == setting]
        steps = [row for row in mine if row["row"] == "step"]
        layers = [row for row in mine if row["row"] == "layer" and row["direction"] == "train"]
        merges = [row for row in mine if row["row"] == "aggregate"]
        parts.append(
            f"Measured on {setting}, {_when(mine)}; times are medians, best variant of each contender."
        )
        if steps:
            parts += ["Whole training steps:", step_table(steps).to_markdown()]
        if layers:
            title = "Layers, forward and both gradients, speed-up over the layers of a network:"
            parts += [title, layer_summary(layers).to_markdown()]
            parts += ["The same, layer by layer:", layer_table(layers).to_markdown()]
        if merges:
            parts += ["Merging what clients send:", merge_table(merges).to_markdown()]
    return "".join(f"\n{part}\n" for part in parts) + ("\n" if parts else "")


def _setting(row: Row) -> str:
    machine, software = row["machine"], row["software"]
    size = f"{row['clients']} clients" if row["row"] == "aggregate" else f"batch {row['batch']}"
    if "device" in row:
        device = row["device"]
        return (
            f"{device['name']}, {row['isa']}, {device['precision']}, {_caches(row)} caches, "
            f"torch {software['torch']}, {size}"
        )
    return (
        f"{machine['cpu']}, {row['threads']} threads, {row['isa']}, torch {software['torch']}, "
        f"SparseProp {software['sparseprop'] or 'absent'}, {size}"
    )


def _caches(row: Row) -> str:
    return str(row.get("caches", CACHES[False]))


def _when(rows: Sequence[Row]) -> str:
    days = sorted({str(row["time"])[:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def step_table(rows: Sequence[Row]) -> Table:
    """One line per network and mask."""
    head = ["network", "mask", "structure", "multiply-adds kept"]
    head += [f"{name}, ms/image" for name in (*RIVALS.values(), "ours")] + [
        f"over {name}" for name in RIVALS.values()
    ]
    table = Table(head, left=3)
    for row in sorted(rows, key=lambda r: (r["model"], r["sparsity"], r["structure"], r["mac_share"])):
        times = [median_ms(row, name) for name in (*RIVALS, "ours")]
        per_image = [milliseconds(None if t is None else t / row["batch"]) for t in times]
        speedups = [ratio(row["speedup"].get(name)) for name in RIVALS]
        table.rows.append(
            [row["model"], mask_label(row), row["structure"], f"{100 * row['mac_share']:.1f} %", *per_image, *speedups]
        )
    return table


def merge_table(rows: Sequence[Row]) -> Table:
    """One line per network, mask and form: against each loop over dense state_dicts, and against a copy."""
    loops = ("multiply", "in place")
    head = ["network", "mask", "form", *(f"state_dict loop, {loop}, ms" for loop in loops), "ours, ms"]
    head += [*(f"over {loop}" for loop in loops), "of the copy's bandwidth"]
    table = Table(head, left=3)
    for row in sorted(rows, key=lambda r: (r["model"], r["sparsity"], r["mask"], r["form"])):
        ours, variants = median_ms(row, "ours"), row["results"]["state_dict"].get("variants", {})
        times = [variants[loop]["median_ms"] if loop in variants else None for loop in loops]
        table.rows.append(
            [
                row["model"],
                mask_label(row),
                row["form"],
                *(milliseconds(time) for time in (*times, ours)),
                *(ratio(time / ours if time and ours else None) for time in times),
                f"{100 * row['copy_share']:.0f} %",
            ]
        )
    return table


def layer_summary(rows: Sequence[Row]) -> Table:
    """One line per network and density: geometric mean and least speed-up."""
    head = ["network", "mask", "structure", "kept", "layers"]
    for name in RIVALS.values():
        head += [f"over {name}: mean", "least"]
    table = Table(head, left=3)
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        key = row["model"], row["mask"], row["structure"], row["target_density"]
        groups.setdefault(key, []).append(row)
    for key, mine in sorted(groups.items(), key=lambda item: (*item[0][:3], -item[0][3])):
        cells = [*key[:3], f"{100 * key[3]:g} %", str(len(mine))]
        for name in RIVALS:
            ratios = [row["speedup"][name] for row in mine if name in row["speedup"]]
            cells += [ratio(geometric_mean(ratios)), ratio(min(ratios))] if ratios else ["-", "-"]
        table.rows.append(cells)
    return table


def layer_table(rows: Sequence[Row]) -> Table:
    """One line per layer and density."""
    head = ["network", "layer", "sizes", "structure", "density", "ours, ms"]
    head += [f"{name}, ms" for name in RIVALS.values()]
    head += [f"over {name}" for name in RIVALS.values()] + ["bound, ms", "useful GFLOP/s", "as if dense"]
    table = Table(head, left=4)
    order = {name: number for number, name in enumerate(dict.fromkeys(row["layer"] for row in rows))}
    for row in sorted(
        rows, key=lambda r: (r["model"], r["mask"], order[r["layer"]], r["structure"], -r["target_density"])
    ):
        best = best_of(row, "ours")
        rates = ["-", "-"]
        if best is not None:
            rates = [digits(row[key] / best["median_ms"] / 1e6) for key in ("useful_flop", "dense_flop")]
        times = [milliseconds(median_ms(row, name)) for name in ("ours", *RIVALS)]
        speedups = [ratio(row["speedup"].get(name)) for name in RIVALS]
        table.rows.append(
            [
                row["model"],
                row["layer"],
                row["label"],
                structure_of(row),
                kept(row),
                *times,
                *speedups,
                milliseconds(row["bound_ms"]),
                *rates,
            ]
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
