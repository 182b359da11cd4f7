# SPDX-License-Identifier: Apache-2.0
"""Whole training steps of ResNet18 and VGG19, uniform 98 %."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import BATCH
from fedpai.bench.step import task_of
from fedpai.bench.step_rivals import CHECKED_STEPS, CONTENDERS, masked_losses


@pytest.mark.parametrize(
    ("contender", "variant"),
    [
        ("ours", "sparsify_"),
        ("dense", "contiguous, eager"),
        ("dense", "channels_last, eager"),
        ("sparseprop", "swap_modules_with_sparse"),
    ],
)
@pytest.mark.parametrize("model", ["resnet18", "vgg19"])
def test_step(benchmark: BenchmarkFixture, model: str, contender: str, variant: str) -> None:
    task, _ = task_of(model, "uniform", 0.98, BATCH)
    trainer = CONTENDERS[contender](task, False)[variant]()
    if isinstance(trainer, str):
        pytest.skip(f"{contender}: {trainer}")
    losses = [float(trainer.step()) for _ in range(CHECKED_STEPS)]
    assert masked_losses(task).problem(losses, trainer.masked) == ""
    benchmark.group = f"{model}, uniform 98 %"
    benchmark.extra_info.update(variant=variant, batch=BATCH)
    benchmark.pedantic(trainer.step, rounds=10, warmup_rounds=1)
