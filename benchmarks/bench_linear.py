# SPDX-License-Identifier: Apache-2.0
"""Linear layers of Conv-4, the multi-layer perceptron and a transformer."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import case_id, cases, run
from fedpai.bench.cases import LayerCase

TOKENS = 2048


@pytest.mark.parametrize("contender", ["ours", "dense", "sparseprop", "torch.sparse"])
@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("density", [0.1, 0.02])
@pytest.mark.parametrize("case", cases("linear", "conv4", "mlp"), ids=case_id)
def test_linear(
    benchmark: BenchmarkFixture, case: LayerCase, density: float, direction: str, contender: str
) -> None:
    run(benchmark, case, density, direction, contender)


@pytest.mark.parametrize("contender", ["ours", "dense", "sparseprop"])
@pytest.mark.parametrize(("density", "structure"), [(0.02, "weight"), (0.1, "16x16")])
@pytest.mark.parametrize("case", cases("linear", "transformer"), ids=case_id)
def test_transformer(
    benchmark: BenchmarkFixture, case: LayerCase, density: float, structure: str, contender: str
) -> None:
    run(benchmark, case, density, "train", contender, batch=TOKENS, structure=structure)
