# SPDX-License-Identifier: Apache-2.0
"""Small runs that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpai.data import Dataset, synthetic
from fedpai.federation.config import RunConfig


@pytest.fixture(scope="session")
def images() -> Dataset:
    """Few generated images, made once."""
    return synthetic(train_size=1000, test_size=200, in_channels=1)


@pytest.fixture
def tiny() -> Callable[..., RunConfig]:
    """Makes configurations of a narrow network on few generated images."""

    def make(**changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "method": "fedavg",
            "model": "conv4",
            "width": 0.125,
            "data": "synthetic",
            "sparsity": 0.8,
            "clients": 4,
            "sample": 3,
            "rounds": 3,
            "batch": 16,
            "max_images": 40,
            "eval_images": 50,
            "threads": 1,
        }
        return RunConfig(**{**settings, **changes})

    return make


@pytest.fixture
def untimed() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads a run folder's metrics without the timings."""

    def read(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            del row["time"]
        return rows

    return read
