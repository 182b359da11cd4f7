# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, in one flat record that is saved beside its results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MASK_MODES = ("shared", "personal")
DENSE_FORMATS = ("channels_last", "contiguous")
ALLOCATIONS = ("global", "uniform", "erk", "flops", "time")
SERVER_OPTIMISERS = ("none", "avgm", "adam", "yogi")
WIRE_FORMATS = ("fp32", "bf16", "fp16")
COMPRESSIONS = ("none", "deflate")
SCORE_FORMATS = ("exact", "coarse")
MERGE_RULES = ("all", "voters")
MAX_THREADS = 1024
"""More end the process where the system has no room for them, before anything can be said."""


class ConfigError(ValueError):
    """A setting that cannot be: the message names it, what came and what is possible."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run. Field names are the command line's long options.

    Attributes:
        method, baseline: registered method names; the baseline runs the same rounds beside the method.
        model, width: network name and factor on its channel counts.
        data, data_root: data set name and the folder to look in (None: the loader's own search).
        sparsity: share of the conv and linear weights that is removed.
        criterion: how weights are scored before training (methods that prune on data).
        allocation: how the kept weights are shared among layers, "time:X" with a limit of its own; None leaves it to
            the criterion (docs/methods/allocation.md).
        structure: what is kept or removed together: "weight", a block such as "16x1" or "8x8-taps", "channel",
            "2:4" or "fan-in" (see docs/structure.md).
        budget: what the sparsity is a share of: "weights", or "flops" for the multiply-adds of one image.
        mask_mode: "shared" (one mask for everybody) or "personal" (each client its own).
        clients, sample: number of clients, and how many of them train in a round.
        rounds, local_epochs, batch: length of the run, passes per round, images per step.
        lr, momentum, weight_decay: plain SGD on the clients, fresh in every round but in FedSparsify.
        prox_mu: FedProx, weight of the squared distance to the global model.
        prune_every: FedSparsify, rounds from one pruning to the next.
        merge_rule: FedSparsify-Local, whose values a kept weight is averaged over: all clients' (zeros included) or
            only those of the voters who keep it.
        threshold_penalty: SpaFL, weight c of the penalty on thresholds.
        adjust_every, adjust_rate: FedDST, rounds between two adjustments of the masks, and the share of the weights
            that the first one moves.
        server_opt, server_lr, server_momentum: the server's step from the old global model towards the merged one.
        scores: how scores travel before training: "exact" in float32, or "coarse", as small integers.
        wire, compress: how values travel, and whether they are entropy-coded (see docs/wire.md).
        alpha: Dirichlet concentration over classes; None splits IID.
        max_images: images a client holds at most; None keeps all.
        eval_images: test images used after each round; None uses all.
        dense_format: memory format of dense models ("channels_last" is oneDNN's faster one).
        seed, threads: the run's only source of randomness; CPU threads of torch and of the kernels.
    """

    method: str = "fedpai-u"
    baseline: str | None = None
    model: str = "resnet18"
    width: float = 1.0
    data: str = "fashion-mnist"
    data_root: str | None = None
    sparsity: float = 0.98
    criterion: str = "grasp"
    allocation: str | None = None
    structure: str = "weight"
    budget: str = "weights"
    mask_mode: str = "shared"
    clients: int = 10
    sample: int = 10
    rounds: int = 10
    local_epochs: int = 1
    batch: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    prox_mu: float = 0.01
    prune_every: int = 1
    merge_rule: str = "all"
    threshold_penalty: float = 0.002
    adjust_every: int = 5
    adjust_rate: float = 0.3
    server_opt: str = "none"
    server_lr: float = 1.0
    server_momentum: float = 0.9
    scores: str = "exact"
    wire: str = "fp32"
    compress: str = "none"
    alpha: float | None = None
    max_images: int | None = None
    eval_images: int | None = 2000
    dense_format: str = "channels_last"
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        _at_least("clients", self.clients, 1)
        _at_least("sample", self.sample, 1)
        if self.sample > self.clients:
            raise ConfigError(f"--sample {self.sample} is more than the {self.clients} clients there are")
        _at_least("rounds", self.rounds, 1)
        _at_least("local-epochs", self.local_epochs, 1)
        _at_least("batch", self.batch, 2)
        _at_least("threads", self.threads, 1)
        if self.threads > MAX_THREADS:
            raise ConfigError(f"--threads must be at most {MAX_THREADS}, got {self.threads}")
        _at_least("seed", self.seed, 0)
        if self.max_images is not None:
            _at_least("max-images", self.max_images, 2)
        if self.eval_images is not None:
            _at_least("eval-images", self.eval_images, 1)
        _between("sparsity", self.sparsity, 0.0, 1.0, open_right=True)
        _positive("lr", self.lr)
        _positive("width", self.width)
        _between("momentum", self.momentum, 0.0, 1.0, open_right=True)
        _between("weight-decay", self.weight_decay, 0.0, math.inf, open_right=True)
        if self.alpha is not None:
            _positive("alpha", self.alpha)
        _between("prox-mu", self.prox_mu, 0.0, math.inf, open_right=True)
        _at_least("prune-every", self.prune_every, 1)
        one_of("merge-rule", self.merge_rule, MERGE_RULES)
        _between("threshold-penalty", self.threshold_penalty, 0.0, math.inf, open_right=True)
        _at_least("adjust-every", self.adjust_every, 1)
        _between("adjust-rate", self.adjust_rate, 0.0, 1.0, open_right=True)
        one_of("server-opt", self.server_opt, SERVER_OPTIMISERS)
        _positive("server-lr", self.server_lr)
        _between("server-momentum", self.server_momentum, 0.0, 1.0, open_right=True)
        one_of("scores", self.scores, SCORE_FORMATS)
        one_of("wire", self.wire, WIRE_FORMATS)
        one_of("compress", self.compress, COMPRESSIONS)
        one_of("mask-mode", self.mask_mode, MASK_MODES)
        _pruning(self)
        one_of("dense-format", self.dense_format, DENSE_FORMATS)
        if self.baseline == self.method:
            raise ConfigError(f"--baseline {self.baseline} is the method itself; name another one")

    @property
    def arms(self) -> tuple[str, ...]:
        """The methods that run: the method, then the baseline if there is one."""
        return (self.method,) if self.baseline is None else (self.method, self.baseline)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: unknown or missing keys, or a value that cannot be.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            missing, extra = sorted(names - set(values)), sorted(set(values) - names)
            raise ConfigError(f"not a run configuration of this version: missing {missing}, unknown {extra}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"not a run configuration: {error}") from None


MOVABLE = frozenset({"data_root"})
"""Settings that may differ when a run is resumed: they say where things are, not what they are."""


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One "key: mine, not theirs" line for each setting that differs and matters."""
    return [
        f"{key}: {theirs.get(key)!r} in the folder, {ours[key]!r} asked for"
        for key in sorted(ours)
        if key not in MOVABLE and key in theirs and ours[key] != theirs[key]
    ]


PRESETS: dict[str, dict[str, Any]] = {}
"""Named bundles of settings for `--preset`; an option given beside one wins over it."""

# ResNet18 at 98 % against dense FedAvg on Fashion-MNIST, sized for two CPU cores: 7,680 images pass through each of the
# two networks. Small batches, because a fresh batch norm needs many steps, not many images. GraSP chooses the weights;
# how many a layer keeps is chosen for time, at GraSP's own accuracy (docs/methods/allocation.md).
PRESETS["demo"] = {
    "method": "fedpai-u",
    "baseline": "fedavg",
    "model": "resnet18",
    "data": "fashion-mnist",
    "sparsity": 0.98,
    "criterion": "grasp",
    "allocation": "time:1.5",
    "scores": "coarse",
    "mask_mode": "shared",
    "clients": 4,
    "rounds": 5,
    "batch": 16,
    "max_images": 384,
    "eval_images": 1000,
}
# The same comparison in seconds: a narrow Conv4 on generated images.
PRESETS["smoke"] = {
    "method": "fedpai-u",
    "baseline": "fedavg",
    "model": "conv4",
    "width": 0.25,
    "data": "synthetic",
    "sparsity": 0.9,
    "clients": 4,
    "rounds": 3,
    "batch": 32,
    "max_images": 128,
    "eval_images": 256,
}


def one_of(name: str, value: object, known: tuple[str, ...] | list[str]) -> None:
    """Raises ConfigError unless the value is one of the known ones."""
    if value not in known:
        raise ConfigError(f"unknown {option(name)} {value!r}, expected one of: {', '.join(known)}")


def _pruning(config: RunConfig) -> None:
    # Imported here, because a parser of command lines must not wait for torch.
    from fedpai.pruning import BUDGETS, parse_allocation, split_alias
    from fedpai_kernels.structure import parse

    one_of("budget", config.budget, BUDGETS)
    try:
        parse(config.structure)
        if config.allocation is not None:
            parse_allocation(config.allocation)
        split_alias(config.criterion, config.allocation)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option(name)} must be a whole number of at least {least}, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{option(name)} must be a positive number, got {value!r}")


def _between(name: str, value: float, low: float, high: float, *, open_right: bool) -> None:
    fits = isinstance(value, int | float) and low <= value and (value < high if open_right else value <= high)
    if not fits:
        raise ConfigError(
            f"{option(name)} must lie in [{low}, {high}{')' if open_right else ']'}, got {value!r}"
        )
