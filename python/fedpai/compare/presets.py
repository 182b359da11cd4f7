# SPDX-License-Identifier: Apache-2.0
"""Named grids for `fedpai compare --preset`; an option given beside one wins over it."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {}
"""Lists for the axes, single values for all other settings."""

# Every column of the report in minutes.
PRESETS["fashion-smoke"] = {
    "method": ["fedavg", "fedpai-u"],
    "model": ["conv4"],
    "sparsity": [0.9, 0.98],
    "mask_mode": ["shared", "personal"],
    "alpha": [None, 0.5],
    "seed": [0, 1],
    "width": 0.25,
    "clients": 4,
    "rounds": 4,
    "max_images": 256,
    "eval_images": 500,
}
# FedPaI-U against dense FedAvg as the paper has it, sized for two CPU cores.
PRESETS["study"] = {
    "method": ["fedavg", "fedpai-u"],
    "model": ["resnet18", "vgg19"],
    "sparsity": [0.9, 0.95, 0.98],
    "mask_mode": ["shared", "personal"],
    "alpha": [None, 0.5, 0.1],
    "seed": [0, 1],
    "width": 0.25,
    "clients": 10,
    "rounds": 8,
    "max_images": 256,
    "eval_images": 500,
}
# The same at full size.
PRESETS["full"] = {
    **PRESETS["study"],
    "seed": [0, 1, 2],
    "width": 1.0,
    "rounds": 50,
    "local_epochs": 1,
    "max_images": None,
    "eval_images": None,
}
