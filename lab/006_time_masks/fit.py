# SPDX-License-Identifier: Apache-2.0
"""What one more kept weight costs in a layer's step: straight lines through measured layers.

    python lab/006_time_masks/fit.py [ROWS ...]     # rows of fedpai bench layers; by default the committed ones
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "layers.jsonl"


def kind_of(case: dict) -> str:
    """As in fedpai.pruning.cost."""
    if case["kind"] == "linear":
        return "linear"
    if case["kernel"] == [1, 1]:
        return "pointwise"
    return "conv2d" if case["stride"] == [1, 1] else "strided"


def positions(case: dict) -> int:
    """Outputs of one channel; rows of a linear layer."""
    pairs = zip(case["image"], case["kernel"], case["stride"], case["padding"], strict=True)
    height, width = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in pairs)
    return height * width


def main() -> None:
    lines = [line for path in sys.argv[1:] or [COMMITTED] for line in Path(path).read_text().splitlines()]
    layers: dict[str, list[dict]] = defaultdict(list)
    for row in map(json.loads, lines):
        if row["direction"] == "train" and row["mask"] == "uniform" and row.get("structure", "weight") == "weight":
            layers[f"{row['model']} {row['label']}"].append(row)
    found: dict[str, list[float]] = defaultdict(list)
    print("layer, ns per image whatever is kept, ns per weight, image and position, largest error of the line")
    for name, rows in layers.items():
        if len(rows) < 3:
            continue
        case, batch = rows[0]["case"], rows[0]["batch"]
        weights = np.array([row["nnz"] for row in rows], float)
        sparse = [row["results"]["ours"]["variants"]["sparse"]["median_ms"] for row in rows]
        times = 1e6 * np.array(sparse) / batch
        # Relative errors count, since the times are an order of magnitude apart.
        terms = np.stack([np.ones_like(weights), weights * positions(case)], 1)
        (fixed, each), *_ = np.linalg.lstsq(terms / times[:, None], np.ones_like(times), rcond=None)
        error = abs(terms @ [fixed, each] / times - 1).max()
        print(f"{name:<32} {fixed:>9.0f} {each:.4f} {error:.0%}")
        if case["in_channels"] > 3:
            found[kind_of(case)].append(each)
    for kind, each in found.items():
        print(f"{kind:<10} {statistics.geometric_mean(each):.3f} of {len(each)} layers")


if __name__ == "__main__":
    main()
