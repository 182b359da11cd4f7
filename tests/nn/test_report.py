# SPDX-License-Identifier: Apache-2.0
"""What the report of a conversion says about the structure of masks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk


def blocks(shape: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Every fourth block of rows x columns, at all taps."""
    numbers = torch.arange(shape[0] // rows)[:, None] * 3 + torch.arange(shape[1] // columns)
    return (numbers % 4 == 0).repeat_interleave(rows, 0).repeat_interleave(columns, 1)[
        (..., *[None] * (len(shape) - 2))
    ].expand(shape)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.Conv2d(32, 32, 1),
        nn.Flatten(), nn.Linear(32 * 4, 16), nn.Linear(16, 10),
    )  # fmt: skip


def test_rows_name_the_structure(model: nn.Sequential) -> None:
    scattered = torch.zeros(10, 16, dtype=torch.bool)
    scattered[0, 3] = scattered[2, 5] = scattered[2, 6] = True
    masks = {"2": blocks((32, 16, 3, 3), 8, 2), "3": blocks((32, 32, 1, 1), 16, 1)}
    masks |= {"5": blocks((16, 128), 4, 4), "6": scattered}
    report = fk.sparsify_(model, masks)
    expected = {"0": "dense", "2": "8x2-taps", "3": "16x1", "5": "4x4", "6": "weight"}
    assert {row.name: row.structure for row in report} == expected
    head, *lines = str(report).splitlines()
    column = head.index("structure")
    for line, structure in zip(lines, expected.values(), strict=False):
        assert line[column:].split()[0] == structure
    assert [row["structure"] for row in json.loads(report.to_json())["rows"]] == list(expected.values())


def test_layers_that_are_left_keep_theirs(model: nn.Sequential) -> None:
    fk.sparsify_(model, {"3": blocks((32, 32, 1, 1), 16, 1)})
    again = fk.sparsify_(model, {"5": blocks((16, 128), 1, 8)})
    assert (again["3"].structure, again["3"].reason) == ("16x1", "as it was")
    assert (again["5"].structure, again["6"].structure) == ("1x8", "dense")


def test_a_mask_that_keeps_everything_is_dense(model: nn.Sequential) -> None:
    report = fk.sparsify_(model, {"5": torch.ones(16, 128, dtype=torch.bool)})
    assert report["5"].structure == "dense"
