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
    "batch": 16,
    "max_images": 256,
    "eval_images": 500,
}
# FedPaI-U against dense FedAvg, sized to take less than two hours on two CPU cores: narrow networks and few images,
# but small batches and three clients a round, because what counts is how many steps follow each other.
PRESETS["study"] = {
    "method": ["fedavg", "fedpai-u"],
    "model": ["resnet18", "vgg19"],
    "sparsity": [0.9, 0.95, 0.98],
    "mask_mode": ["shared", "personal"],
    "alpha": [None, 0.5, 0.1],
    "seed": [0, 1],
    "width": 0.25,
    "clients": 10,
    "sample": 3,
    "rounds": 20,
    "batch": 16,
    "max_images": 400,
    "eval_images": 800,
}
# How much sooner a network of full width gets there over a slow link: dense; GraSP's own layers; layers chosen for
# time.
PRESETS["sooner"] = {
    "method": ["fedavg", "fedpai-u"],
    "model": ["resnet18"],
    "sparsity": [0.98],
    "allocation": ["global", "time"],
    "alpha": [None, 0.5],
    "seed": [0, 1],
    "scores": "coarse",
    "clients": 10,
    "sample": 3,
    "rounds": 12,
    "batch": 16,
    "max_images": 400,
    "eval_images": 1000,
}
# The study at full size: days on two cores.
PRESETS["full"] = {
    **PRESETS["study"],
    "seed": [0, 1, 2],
    "width": 1.0,
    "sample": 10,
    "rounds": 50,
    "batch": 32,
    "max_images": None,
    "eval_images": None,
}
# Every method beside dense FedAvg on one small network.
PRESETS["methods"] = {
    "method": [
        *("fedavg", "fedprox", "local", "random", "magnitude", "fedpai-u", "fedpai-s"),
        *("fedsparsify-global", "fedsparsify-local", "spafl", "feddst", "ssfl"),
    ],
    "model": ["conv4"],
    "sparsity": [0.95],
    "alpha": [None, 0.5],
    "seed": [0, 1],
    "width": 0.5,
    "clients": 10,
    "rounds": 15,
    "batch": 16,
    "max_images": 256,
    "eval_images": 1000,
}
# SpaFL's Fashion-MNIST setting, as in its released scripts but for the number of rounds, which is 500 there, and the
# learning rate, which is 0.001 there for pixels of 0 to 255.
PRESETS["spafl-lenet"] = {
    "method": ["fedavg", "local", "spafl"],
    "model": ["lenet-20-50-500"],
    "data": "fashion-mnist-28",
    "alpha": [0.2],
    "seed": [0, 1],
    "clients": 100,
    "sample": 10,
    "rounds": 50,
    "local_epochs": 5,
    "batch": 64,
    "lr": 0.01,
    "weight_decay": 0.0,
    "threshold_penalty": 0.002,
    "eval_images": None,
}
# FedSparsify's Fashion-MNIST setting, as in its released scripts but for 60 rounds of 200 and 1,000 images a client of
# 6,000. SNIP and GraSP before training are fedpai-u by that criterion.
PRESETS["fedsparsify-mlp"] = {
    "method": ["fedavg", "fedsparsify-global", "fedsparsify-local", "fedpai-u", "random"],
    "model": ["mlp"],
    "sparsity": [0.95, 0.99],
    "criterion": ["snip", "grasp"],
    "data": "fashion-mnist-28",
    "seed": [0, 1],
    "clients": 10,
    "rounds": 60,
    "local_epochs": 4,
    "lr": 0.02,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "max_images": 1000,
    "eval_images": None,
}
