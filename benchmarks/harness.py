# SPDX-License-Identifier: Apache-2.0
"""What the suites share. All measuring and checking is that of ``fedpai.bench``.

A suite follows one contender from commit to commit (``pytest-benchmark compare``). For ratios between contenders use
``fedpai bench``, which lets them take turns.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fedpai.bench.cases import LayerCase, merged, read_csv
from fedpai.bench.masks import uniform_mask
from fedpai.bench.rivals import CONTENDERS, Problem, Unavailable
from fedpai.bench.rivals.base import TOLERANCE
from fedpai.bench.timing import Effort, interleave

LAYERS = Path(__file__).parent / "layers"
BATCH = 64


def cases(kind: str, *networks: str) -> list[LayerCase]:
    """Layers of one kind, each size once."""
    found = [case for name in networks for case in read_csv(LAYERS / f"{name}.csv") if case.kind == kind]
    return merged(found)


def case_id(case: LayerCase) -> str:
    """The label as a test id, in characters that ``pytest -k`` takes: ``64-128_3x3s2_im32``."""
    return case.label.replace(" @", "_im").replace("/", "s").replace(" ", "_")


def run(
    benchmark: BenchmarkFixture,
    case: LayerCase,
    density: float,
    direction: str,
    contender: str,
    *,
    batch: int = BATCH,
    structure: str = "weight",
) -> None:
    """Checks a contender against the reference and measures its best variant."""
    mask = uniform_mask(case.weight_shape, density, structure=structure, groups=case.groups)
    problem = Problem.make(case, batch, mask)
    try:
        variants = CONTENDERS[contender](problem)
    except Unavailable as reason:
        pytest.skip(f"{contender} {reason}")
    errors = {variant.variant: variant.error(problem) for variant in variants}
    assert max(errors.values()) <= TOLERANCE, errors
    calls = {v.variant: v.calls[direction] for v in variants if direction in v.calls}
    if not calls:
        pytest.skip(f"{contender} computes both gradients in one sweep only")
    best = next(iter(calls))
    if len(calls) > 1 and benchmark.enabled:
        timings = interleave(calls, Effort(samples=3))
        best = min(timings, key=lambda name: timings[name].median)
    benchmark.group = f"{case.label}, density {density:g}, structure {structure}, {direction}"
    benchmark.extra_info.update(variant=best, density=density, structure=structure, batch=batch)
    benchmark(calls[best])
