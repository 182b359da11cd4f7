# SPDX-License-Identifier: Apache-2.0
"""Fits the constants of csrc/cpu/conv2d/tiling.cpp to the rows of sample.cpp: by non-negative least squares, and from
there for the choices that they make.

Usage: python fit.py GHZ LANES rows.csv [more.csv ...]

A shared machine slows down and speeds up for seconds at a time, so every problem gets a speed of its own: only how its
tilings compare is fitted, and the mean of all speeds is 1.
"""

import math
import sys
from collections import defaultdict

import numpy as np
import pandas as pd
from scipy.optimize import nnls

L1_RAMP, L2_RAMP, LINE, ELEMENT, CHAINS = (24e3, 80e3), (250e3, 500e3), 64, 4, 8
PROBLEM = ["batch", "channels_in", "out", "image", "kernel", "stride", "nnz", "height", "grad"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def spilled(size: float, ramp: tuple[float, float]) -> float:
    return min(1.0, max(0.0, (size - ramp[0]) / (ramp[1] - ramp[0])))


def features(r: "pd.core.frame.Pandas", lanes: int) -> dict[str, float]:
    """How often each cost of the model occurs; the same arithmetic as Costs::cycles() in tiling.cpp, but for
    lane groups that the batch does not fill."""
    vector = ELEMENT * lanes
    halos: dict[int, int] = {}
    for shift in range(r.kernel):
        residue, reach = shift % r.stride, shift // r.stride
        halos[residue] = max(halos.get(residue, 0), reach)
    phases, halo, grid = len(halos), max(halos.values()), r.out_image
    groups = ceil_div(r.batch, r.blocks * lanes)
    bundles = ceil_div(groups, r.groups)
    rows, across = ceil_div(grid, r.rows), ceil_div(grid, r.patch_width)
    boxes = ceil_div(rows, r.patch_rows) * across
    tiles_across = ceil_div(min(grid, r.patch_width) * r.blocks, r.run)
    tiles = rows * across * tiles_across * groups
    strips = rows * across * ceil_div(tiles_across, r.strip) * groups
    blocks = ceil_div(r.channels_in, r.channel_block)
    dest_vectors = grid * grid * groups * r.blocks
    height, width = min(grid, r.rows * r.patch_rows), min(grid, r.patch_width)
    patch_pixels = phases**2 * (height + halo) * (width + halo)
    strip = r.run * r.strip
    window_vectors = phases**2 * (r.rows + halo) * (strip + halo * min(strip, r.blocks))

    taps = r.nnz / (r.out * r.channels_in)
    taps_per_pair = max(1.0, 0.65 * taps / (1 - math.exp(-taps)))
    entries, panels = r.nnz / r.height, ceil_div(r.out, r.height)
    entry_bytes = (4 * entries + ELEMENT * r.nnz) / blocks
    channel_block = min(r.channel_block, r.channels_in)
    window_bytes = window_vectors * channel_block * vector
    window = spilled(window_bytes + 0.5 * entry_bytes, L1_RAMP)
    patch_bytes = patch_pixels * channel_block * r.blocks * vector if r.height == 1 or r.grad else window_bytes
    patch = spilled(patch_bytes + entry_bytes, L2_RAMP)
    left = spilled(patch_pixels * channel_block * r.blocks * vector, L2_RAMP)
    unit_left = spilled(patch_pixels * channel_block * r.blocks * min(r.groups, groups) * vector, L2_RAMP)
    dest = spilled(height * width * r.out * r.blocks * r.groups * vector, L2_RAMP)
    revisits = panels * (blocks - 1) * (1 - math.exp(-entries / (panels * blocks)))
    tasks = panels + revisits
    lines = max(1.0, r.blocks * r.groups * vector / LINE)
    patches = r.channels_in * boxes * bundles
    half = r.blocks * vector < LINE and r.batch > lanes
    # Vectors of a tile are as many sums that do not wait for each other; a panel's weight gradient has enough.
    across_vectors = min(grid, r.patch_width) * r.blocks
    run = across_vectors / ceil_div(across_vectors, r.run)
    slow = 1.0 if r.grad else max(1.0, CHAINS / (r.height * min(r.rows, grid) * run))
    return {
        "Fma": r.nnz * dest_vectors * slow,
        "FetchL2": entries * dest_vectors * window * (1 - patch) / taps_per_pair,
        "FetchL3": entries * dest_vectors * window * patch / taps_per_pair,
        "EntryL2": entries * tiles * spilled(entry_bytes, L1_RAMP),
        "Task": tasks * tiles,
        "Reload": revisits * r.height * dest_vectors * (1 - r.grad),
        "ReloadL3": revisits * r.height * dest_vectors * dest * (r.height > 1) * (1 - r.grad),
        "Load": tasks * r.height * dest_vectors * r.grad,
        "LoadL3": revisits * r.height * dest_vectors * dest * r.grad,
        "Sum": r.nnz * tiles * r.grad,
        "HalfLine": tasks * r.height * dest_vectors * half,
        "SourceLine": patches * patch_pixels * lines,
        "SourceRun": patches * phases * (height + halo),
        "DestLine": r.out * grid**2 * groups * max(1.0, r.blocks * vector / LINE),
        "DestRun": r.out * boxes * (bundles if r.height == 1 else groups) * height,
        "Split": tasks * r.height * strips * (r.height > 1) * (1 - r.grad),
        "Tile": tiles * blocks,
        "WindowL3": strips * blocks * window_vectors * channel_block * left * (r.height > 1),
        "PackedL3": patches * patch_pixels * lines * unit_left * (r.height > 1),
        "Hop": tasks * r.height * grid**2 * groups * (groups > 1 and r.height > 1),
    }


def main() -> None:
    ghz, lanes = float(sys.argv[1]), int(sys.argv[2])
    table = pd.concat([pd.read_csv(path) for path in sys.argv[3:]]).rename(columns={"in": "channels_in"})
    panels = table[table.height > 1]
    for title, part in (
        ("single rows", table[table.height == 1]),
        ("panels, forward", panels[panels.grad == 0]),
        ("panels, weight gradient", panels[panels.grad == 1]),
    ):
        print(f"---- {title}: {len(part)} samples")
        if len(part):
            fit(part, ghz, lanes)


def fit(table: pd.DataFrame, ghz: float, lanes: int) -> None:
    rows = list(table.itertuples())
    problems = [tuple(int(getattr(r, name)) for name in PROBLEM) for r in rows]
    found = [features(r, lanes) for r in rows]
    names = list(found[0])
    x = np.array([list(f.values()) for f in found], dtype=float)
    cycles = table.ms.to_numpy() * 1e6 * ghz
    speed = dict.fromkeys(problems, 1.0)
    for _ in range(6):
        scaled = cycles * np.array([speed[p] for p in problems])
        constants, _ = nnls(x / scaled[:, None], np.ones(len(scaled)))
        ratios = defaultdict(list)
        for problem, ratio in zip(problems, np.log(x @ constants / cycles), strict=True):
            ratios[problem].append(ratio)
        centre = np.mean([np.median(v) for v in ratios.values()])
        speed = {p: math.exp(np.clip(np.median(v) - centre, -0.3, 0.3)) for p, v in ratios.items()}
    show("least squares", names, constants, x, cycles, problems)
    show("for the choice", names, fit_choice(constants, x, cycles, problems), x, cycles, problems)


CHOICES = 6  # the model's best are judged together: one sample is noise


def choice_loss(
    constants: np.ndarray, x: np.ndarray, cycles: np.ndarray, problems: list[tuple[int, ...]]
) -> tuple[dict[tuple[int, ...], float], float]:
    """Per problem, how much longer than the best sample the model's choices take; and how wrong their estimates are."""
    predicted = x @ constants
    by_problem = defaultdict(list)
    for i, problem in enumerate(problems):
        by_problem[problem].append(i)
    losses, errors = {}, []
    for problem, at in by_problem.items():
        chosen = sorted(at, key=lambda i: predicted[i])[:CHOICES]
        losses[problem] = math.exp(np.mean(np.log(cycles[chosen])) - math.log(min(cycles[at])))
        errors.append(abs(np.mean(np.log(predicted[chosen] / cycles[chosen]))))
    return losses, float(np.mean(errors))


def fit_choice(
    start: np.ndarray, x: np.ndarray, cycles: np.ndarray, problems: list[tuple[int, ...]], rounds: int = 2500
) -> np.ndarray:
    """Constants that choose well, by random search: most samples are bad tilings, and least squares fits those too."""
    random = np.random.default_rng(0)

    def objective(constants: np.ndarray) -> float:
        losses, error = choice_loss(constants, x, cycles, problems)
        spread = np.log(np.maximum(x @ constants, 1.0) / cycles).std()
        return float(np.mean(np.log(list(losses.values()))) + 0.3 * spread + 0.5 * error)

    occurs = x.any(axis=0)
    best = np.where(occurs, np.maximum(start, 0.1), 0.0)  # what least squares left out may come back
    least = objective(best)
    for _ in range(rounds):
        step = random.normal(0, 0.35, len(best)) * (random.random(len(best)) < 0.25)
        tried = best * np.exp(step)
        value = objective(tried)
        if value < least:
            best, least = tried, value
    return best


def show(
    title: str, names: list[str], constants: np.ndarray, x: np.ndarray, cycles: np.ndarray, problems: list[tuple[int, ...]]
) -> None:
    print(f"-- {title}")
    for name, value in zip(names, constants, strict=True):
        print(f"k{name:12s} {value:8.2f}")
    spread = np.quantile(x @ constants / cycles, [0.05, 0.25, 0.5, 0.75, 0.95]).round(2)
    print("predicted / measured, 5 25 50 75 95 %:", spread)
    losses, _ = choice_loss(constants, x, cycles, problems)
    print(f"loss of the model's {CHOICES} best among the samples:")
    for problem, loss in losses.items():
        print(f"  {problem}: {loss:.2f} x")
    print(f"geometric mean {np.exp(np.mean(np.log(list(losses.values())))):.3f}")


if __name__ == "__main__":
    main()
