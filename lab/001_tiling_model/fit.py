# SPDX-License-Identifier: Apache-2.0
"""Fits the constants of csrc/cpu/conv2d/tiling.cpp to the rows of sample.cpp, by non-negative least squares.

Usage: python fit.py rows.csv GHZ LANES
"""

import math
import sys
from collections import defaultdict

import numpy as np
import pandas as pd
from scipy.optimize import nnls

L1_BYTES, L2_BYTES, LINE, PAGE, TLB_BYTES, BATCH = 26 * 1024, 320 * 1024, 64, 4096, 8e6, 64
NAMES = ["fma", "fetch_l2", "fetch_l3", "entry", "task", "store", "reload", "dest_miss", "pack", "source_line"]
NAMES += ["dest_line", "page", "tile", "sum"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def features(r: "pd.Series", lanes: int) -> list[float]:
    """How often each cost of the model occurs; the same arithmetic as estimate() in tiling.cpp."""
    vector = 4 * lanes
    shifts = range(int(r.kernel))
    halos: dict[int, int] = {}
    for shift in shifts:
        residue, reach = shift % int(r.stride), shift // int(r.stride)
        halos[residue] = max(halos.get(residue, 0), reach)
    phases, halo, grid = len(halos), max(halos.values()), int(r.out_image)
    groups = ceil_div(BATCH, int(r.blocks) * lanes)
    rows, columns = ceil_div(grid, int(r.rows)), ceil_div(grid, int(r.columns))
    tiles = rows * columns * groups
    patches = ceil_div(rows, int(r.patch_rows)) * ceil_div(columns, int(r.patch_columns)) * groups
    channel_blocks = ceil_div(int(r["in"]), int(r.channel_block))
    dest_vectors = grid * grid * groups * r.blocks
    height, width = min(grid, r.rows * r.patch_rows), min(grid, r.columns * r.patch_columns)
    patch_pixels = phases * phases * (height + halo) * (width + halo)
    packed = patch_pixels * r.blocks * r["in"] * patches
    tile_bytes = (r.rows + halo) * (r.columns + halo) * phases**2 * r.channel_block * r.blocks * vector
    patch_bytes = patch_pixels * r.channel_block * r.blocks * vector
    taps_per_pair = max(1.0, 0.7 * r.nnz / (r.out * r["in"]))
    tasks = r.out if channel_blocks == 1 else r.out + r.out * channel_blocks * (1 - math.exp(-r.nnz / (r.out * channel_blocks)))
    lines = max(1.0, r.blocks * vector / LINE)
    rounds = channel_blocks if r.grad else 1
    pixel = BATCH * 4
    source_pages = patches * r["in"] * phases * (height + halo) * (1 + (width + halo) * phases * pixel / PAGE)
    dest_pages = patches * rounds * r.out * height * (1 + width * pixel / PAGE)
    pages = source_pages * (r["in"] * r.image**2 * pixel > TLB_BYTES) + dest_pages * (r.out * grid**2 * pixel > TLB_BYTES)
    spilled = tile_bytes > L1_BYTES
    fetches = r.nnz * dest_vectors / taps_per_pair * spilled
    reloads = (tasks - r.out) * dest_vectors * (1 - r.grad)
    return [
        r.nnz * dest_vectors, fetches * (patch_bytes <= L2_BYTES), fetches * (patch_bytes > L2_BYTES), r.nnz * tiles,
        tasks * tiles, tasks * dest_vectors, reloads, reloads * (height * width * r.out * lines * LINE > L2_BYTES),
        packed, packed / r.blocks * lines, grid * grid * groups * r.out * lines * rounds, pages, tiles * channel_blocks,
        r.nnz * tiles * r.grad,
    ]  # fmt: skip


def main() -> None:
    rows = pd.read_csv(sys.argv[1])
    lanes = int(sys.argv[3])
    rows = rows[rows.blocks * lanes * 4 >= LINE]  # the others lose always
    x = np.array([features(r, lanes) for _, r in rows.iterrows()], dtype=float)
    cycles = rows.ms.to_numpy() * 1e6 * float(sys.argv[2])
    constants, _ = nnls(x / cycles[:, None], np.ones(len(cycles)))
    for name, value in zip(NAMES, constants, strict=True):
        print(f"{name:12s} {value:8.2f}")
    predicted = x @ constants
    print("predicted / measured, 5 25 50 75 95 %:", np.quantile(predicted / cycles, [0.05, 0.25, 0.5, 0.75, 0.95]).round(2))
    problems = defaultdict(list)
    for (_, r), p in zip(rows.iterrows(), predicted, strict=True):
        problems[(r["in"], r.out, r.image, r.kernel, r.stride, r.nnz, r.grad)].append((p, r.ms))
    print("loss of the model's choice among the samples:")
    for problem, found in problems.items():
        best = min(ms for _, ms in found)
        print(f"  {tuple(int(v) for v in problem)}: best {best:.2f} ms, chosen {min(found)[1] / best:.2f} x")


if __name__ == "__main__":
    main()
