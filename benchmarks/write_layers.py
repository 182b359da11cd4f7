# SPDX-License-Identifier: Apache-2.0
"""Writes ``benchmarks/layers/*.csv`` from the networks of ``fedpai.models``: python benchmarks/write_layers.py"""

from __future__ import annotations

from pathlib import Path

from fedpai.bench.cases import layers_of_network, merged, to_csv

FOLDER = Path(__file__).parent / "layers"
NETWORKS = (
    *("conv4", "lenet5", "mlp", "resnet18", "resnet34", "vgg11", "vgg16", "vgg19"),
    *("wrn16x4", "wrn28x10"),
)


def path_of(name: str) -> Path:
    """Where a network's list is."""
    return FOLDER / f"{name}.csv"


def rendered(name: str) -> str:
    """What the file of a network holds."""
    return to_csv(merged(layers_of_network(name)))


if __name__ == "__main__":
    for network in NETWORKS:
        path_of(network).write_text(rendered(network), encoding="utf-8")
        print(path_of(network))
