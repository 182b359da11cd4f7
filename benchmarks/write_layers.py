# SPDX-License-Identifier: Apache-2.0
"""Writes ``benchmarks/layers/*.csv`` from the networks of ``fedpai.models``, and the list of a transformer's layers:
python benchmarks/write_layers.py
"""

from __future__ import annotations

from pathlib import Path

from fedpai.bench.cases import TRANSFORMER, layers_named, merged, to_csv

FOLDER = Path(__file__).parent / "layers"
LISTS = (
    *("conv4", "lenet5", "mlp", "resnet18", "resnet34", "vgg11", "vgg16", "vgg19"),
    *("vit-small", "vit-tiny", "wrn16x4", "wrn28x10", TRANSFORMER),
)


def path_of(name: str) -> Path:
    """Where a list is."""
    return FOLDER / f"{name}.csv"


def rendered(name: str) -> str:
    """What the file of a list holds."""
    return to_csv(merged(layers_named(name)))


if __name__ == "__main__":
    for name in LISTS:
        path_of(name).write_text(rendered(name), encoding="utf-8")
        print(path_of(name))
