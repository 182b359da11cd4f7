# SPDX-License-Identifier: Apache-2.0
"""Convolutions of ResNet18 and VGG19."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import case_id, cases, run
from fedpai.bench.cases import LayerCase


@pytest.mark.parametrize("contender", ["ours", "dense", "sparseprop"])
@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("density", [0.1, 0.02])
@pytest.mark.parametrize("case", cases("conv2d", "resnet18", "vgg19"), ids=case_id)
def test_conv2d(
    benchmark: BenchmarkFixture, case: LayerCase, density: float, direction: str, contender: str
) -> None:
    run(benchmark, case, density, direction, contender)
