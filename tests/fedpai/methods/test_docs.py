# SPDX-License-Identifier: Apache-2.0
"""The example in docs/add_a_method.md is a working method."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpai import methods
from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.runner import Run

PAGE = Path(__file__).parents[3] / "docs" / "add_a_method.md"


def test_the_example_runs(
    images: Dataset, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    monkeypatch.setitem(methods.METHODS, "two-step", namespace["TwoStep"])
    run = Run(tiny(method="two-step", rounds=4, sample=4), data=images)
    rows = run.finish()
    assert [round(row["global_density"], 2) for row in rows] == [0.6, 0.6, 0.6, 0.2, 0.2]
    assert rows[4]["bytes_down"] > rows[4]["bytes_up"]
    assert all(row["refused"] == [] for row in rows)


def test_the_page_names_every_hook() -> None:
    hooks = {
        name
        for name, value in vars(methods.Method).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    text = PAGE.read_text(encoding="utf-8")
    assert len(hooks) == 12
    assert {name for name in hooks if f"`{name}" not in text} == set()
