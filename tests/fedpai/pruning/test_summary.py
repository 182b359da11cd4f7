# SPDX-License-Identifier: Apache-2.0
"""What masks keep, counted by hand."""

import json

import pytest
import torch
from torch import nn

from fedpai import models, pruning


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 5),
    )


def test_counts(model: nn.Module) -> None:
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    mask.view(-1)[:18] = True
    result = pruning.summary({"0": mask}, model, image_size=16)
    assert [(r.name, r.kind, r.shape, r.kept, r.total, r.macs, r.structure) for r in result.rows] == [
        ("0", "conv2d", (4, 2, 3, 3), 18, 72, 72 * 64, "channel"),
        ("1", "conv2d", (4, 2, 3, 3), 72, 72, 72 * 64, "dense"),
        ("3", "linear", (5, 256), 1280, 1280, 1280, "dense"),
    ]
    assert result.rows[0].density == 0.25
    assert (result.kept, result.total) == (1370, 1424)
    assert result.kept_macs == 18 * 64 + 72 * 64 + 1280
    assert result.mac_share == result.kept_macs / (144 * 64 + 1280)
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["kept_macs"] == 18 * 64
    lines = str(result).splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "structure", "kept"]
    assert lines[1].split()[:4] == ["0", "4x2x3x3", "channel", "18"]
    assert "0.2500" in lines[1]
    assert lines[-1].startswith("total")


def test_resnet18_multiply_adds() -> None:
    model = models.create("resnet18", seed=0)
    masks = pruning.prune(model, 0.98, "uniform")
    result = pruning.summary(masks, model)
    assert result.macs / 1e9 == pytest.approx(0.555, rel=5e-3)
    assert result.mac_share == pytest.approx(0.02, rel=1e-2)
    assert pruning.summary(masks, model, image_size=16).macs < result.macs / 3.9


def test_model_is_left_alone(model: nn.Module) -> None:
    model.train()
    pruning.summary({}, model, image_size=16)
    assert model.training
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("structure", ["weight", "2x1", "1x1-taps", "channel"])
def test_structure_of_pruned_networks(structure: str) -> None:
    model = models.create("vgg11", width=0.125, seed=0)
    masks = pruning.prune(model, 0.8, "random", structure=structure)
    rows = pruning.summary(masks, model).rows
    assert {row.structure for row in rows[1:-1]} == {structure}


def test_groups_are_looked_at(model: nn.Module) -> None:
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[:2, 0] = mask[2:, 1] = False
    assert pruning.summary({"1": mask}, model, image_size=16).rows[1].structure == "channel"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"2": torch.ones(1, dtype=torch.bool)}, "'2' is no convolution or linear layer"),
        ({"0": torch.ones(4, 2, 3, 3)}, r"0 is torch.float32 \(4, 2, 3, 3\), expected torch.bool"),
        ({"0": torch.ones(4, 2, dtype=torch.bool)}, r"expected torch.bool \(4, 2, 3, 3\)"),
    ],
)
def test_refusals(masks: dict, message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.summary(masks, model, image_size=16)
