# SPDX-License-Identifier: Apache-2.0
"""Which runs a grid means, what they are called, and what is refused before any of them starts."""

from __future__ import annotations

from typing import Any

import pytest

from fedpai import methods
from fedpai.cli.compare import asked
from fedpai.compare.grid import AXES, check, expand
from fedpai.compare.presets import PRESETS
from fedpai.data import Dataset
from fedpai.federation.config import ConfigError, RunConfig


def names(axes: dict[str, list[Any]], **settings: Any) -> list[str]:
    return [cell.name for cell in expand(axes, settings)]


def test_a_method_runs_once_for_axes_that_it_does_not_use() -> None:
    axes = {"method": ["fedavg", "random", "fedpai-u"], "sparsity": [0.9, 0.98], "mask_mode": ["shared", "personal"]}
    assert names(axes) == [
        "resnet18-fedavg-iid-seed0",
        "resnet18-random-0.9-iid-seed0",
        "resnet18-random-0.98-iid-seed0",
        "resnet18-fedpai-u-0.9-grasp-shared-iid-seed0",
        "resnet18-fedpai-u-0.9-grasp-personal-iid-seed0",
        "resnet18-fedpai-u-0.98-grasp-shared-iid-seed0",
        "resnet18-fedpai-u-0.98-grasp-personal-iid-seed0",
    ]


def test_seeds_are_the_slowest_and_partitions_have_words() -> None:
    axes = {"method": ["fedavg"], "model": ["vgg19", "conv4"], "alpha": [None, 0.5], "seed": [0, 1]}
    assert names(axes)[:5] == [
        "vgg19-fedavg-iid-seed0",
        "vgg19-fedavg-alpha0.5-seed0",
        "conv4-fedavg-iid-seed0",
        "conv4-fedavg-alpha0.5-seed0",
        "vgg19-fedavg-iid-seed1",
    ]


def test_labels_name_what_varies() -> None:
    axes: dict[str, list[Any]] = {"method": ["fedavg", "fedpai-u"], "sparsity": [0.98], "criterion": ["snip", "grasp"]}
    cells = expand({**axes, "seed": [0, 1]}, {})
    assert {cell.label for cell in cells} == {"fedavg", "fedpai-u snip 98 %", "fedpai-u grasp 98 %"}
    assert {cell.family for cell in cells} == {"fedavg", "fedpai-u snip", "fedpai-u grasp"}
    assert len(cells) == 6
    assert {cell.label for cell in expand({"method": ["random"], "sparsity": [0.985]}, {})} == {"random 98.5 %"}


def test_a_cell_is_a_normal_run_without_what_means_nothing_to_it() -> None:
    cells = expand({"method": ["fedavg", "random"], "sparsity": [0.9]}, {"structure": "16x1", "rounds": 3, "lr": 0.2})
    dense, sparse = (cell.config for cell in cells)
    assert dense == RunConfig(method="fedavg", rounds=3, lr=0.2)
    assert sparse == RunConfig(method="random", sparsity=0.9, structure="16x1", rounds=3, lr=0.2)


@pytest.mark.parametrize(
    ("axes", "settings", "explicit", "message"),
    [
        ({"method": ["fedavg", "nope"]}, {}, {}, "unknown --method 'nope', expected one of: fedavg"),
        ({"sparsity": [0.9, 1.0]}, {}, {"sparsity"}, r"--sparsity must lie in \[0.0, 1.0\), got 1.0"),
        ({"mask_mode": ["shared", "both"]}, {}, {}, "unknown --mask-mode 'both'"),
        ({"alpha": [None, -1.0]}, {}, {}, "--alpha must be a positive number, got -1.0"),
        ({"method": ["fedavg", "random"]}, {"rounds": 0}, {}, "--rounds must be a whole number"),
        (
            {"method": ["fedavg", "random"], "criterion": ["snip"]},
            {},
            {"criterion"},
            "--criterion means nothing to fedavg and random",
        ),
        ({"method": ["fedavg"]}, {"structure": "16x1"}, {"structure"}, "--structure means nothing to fedavg"),
    ],
)
def test_mistakes(axes: dict[str, Any], settings: dict[str, Any], explicit: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(axes, settings, frozenset(explicit))


def test_what_only_some_methods_use_is_no_mistake() -> None:
    axes: dict[str, list[Any]] = {"method": ["fedavg", "fedpai-u"], "criterion": ["snip"]}
    assert len(expand(axes, {}, frozenset({"method", "criterion"}))) == 2


@pytest.mark.parametrize(
    ("axes", "settings", "message"),
    [
        ({"model": ["conv4", "resnet19"]}, {}, "--model resnet19: unknown model"),
        ({"criterion": ["snip", "best"]}, {}, "unknown --criterion 'best'"),
        ({"sparsity": [0.9, 0.99999]}, {}, "--sparsity 0.99999: sparsity"),
        ({}, {"clients": 5000, "sample": 2}, "--clients 5000: num_partitions"),
    ],
)
def test_impossible_runs_are_found_before_the_first(
    images: Dataset, axes: dict[str, list[Any]], settings: dict[str, Any], message: str
) -> None:
    base = {"model": ["conv4"], "sparsity": [0.9]}
    cells = expand({**base, **axes}, {"width": 0.125, "data": "synthetic-gray", "threads": 1, **settings})
    with pytest.raises(ConfigError, match=message):
        check(cells, images)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    """They hold settings that exist, lists where lists belong, and every method that is there runs."""
    axes, settings = asked({}, name)
    assert set(PRESETS[name]) <= set(RunConfig.__dataclass_fields__)
    assert all(isinstance(values, list) and values for values in axes.values())
    assert not any(isinstance(value, list) for value in settings.values())
    known = [method for method in axes["method"] if method in methods.METHODS]
    cells = expand({**axes, "method": known}, settings)
    assert {cell.config.method for cell in cells} == set(known) >= {"fedavg"}
    assert all(len(axes[key]) == len(set(axes[key])) for key in AXES if key in axes)


def test_explicit_options_win_over_a_preset() -> None:
    axes, settings = asked({"sparsity": [0.5], "clients": 20, "rounds": 1}, "study")
    assert axes["sparsity"] == [0.5]
    assert axes["method"] == PRESETS["study"]["method"]
    assert (settings["clients"], settings["sample"], settings["rounds"]) == (20, 20, 1)
