# SPDX-License-Identifier: Apache-2.0
"""Who trains a network: this project's conversion and the rivals, each with an optimiser of its own."""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpai.bench.cases import case_of
from fedpai.bench.rivals.sparseprop import installed, unsupported

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
CHECKED_STEPS = 3
BF16 = "sparsify_, bf16 activations"
"""The variant of ours that `--activation-dtype bf16` adds."""

# Losses may differ by this many times the difference of dense torch between two memory formats, and by this share
# of the loss besides.
_FORMATS_APART, _ROUNDING = 10.0, 2e-5


@dataclass(frozen=True, eq=False)
class Task:
    """A network to train.

    Attributes:
        network: in train mode, contiguous; zero outside of the masks.
        masks: bool, by module name.
        images, labels: one batch, float32 (N, C, H, W) contiguous and int64 (N,).
        bf16: whether ours is also tried with saved activations in bfloat16.
    """

    network: nn.Module
    masks: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor
    bf16: bool = False

    def to(self, place: torch.device) -> Task:
        """The same elsewhere; the network itself goes there."""
        return replace(
            self, network=self.network.to(place), images=self.images.to(place), labels=self.labels.to(place)
        )


_torch_sgd = partial(torch.optim.SGD, fused=True)  # its fastest form


@dataclass(eq=False)
class Trainer:
    """A network with its optimiser; :meth:`step` is what is timed.

    Attributes:
        network: called with the images.
        parameters_of: whose parameters are trained, where that is another module than `network`.
        images, labels: in the layout that suits the network.
        masked: whether weights outside of the masks stay away (dense torch trains them).
        layers: how many layers compute sparsely and densely, where that was chosen.
        sgd: the optimiser.
        exact: whether gradients are as exact as dense torch's, so that later losses must agree too.
        convert_ms: what `sparsify_` took, where that made the network.
    """

    network: Callable[[Tensor], Tensor]
    parameters_of: nn.Module
    images: Tensor
    labels: Tensor
    masked: bool = False
    layers: dict[str, int] = field(default_factory=dict)
    sgd: Callable[..., torch.optim.Optimizer] = _torch_sgd
    exact: bool = True
    convert_ms: float | None = None

    def __post_init__(self) -> None:
        self._optimiser = self.sgd(
            self.parameters_of.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def step(self) -> Tensor:
        """Forward, cross-entropy, backward, SGD. Returns the loss."""
        self._optimiser.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self.network(self.images), self.labels)
        loss.backward()
        self._optimiser.step()
        return loss.detach()


# A trainer, or why there is none.
Build = Callable[[], Trainer | str]


def _ours(task: Task, compiled: bool) -> dict[str, Build]:
    builds: dict[str, Build] = {"sparsify_": lambda: our_trainer(task, copy.deepcopy(task.network))}
    if task.bf16:
        builds[BF16] = lambda: our_trainer(task, copy.deepcopy(task.network), bf16=True)
    return builds


def our_trainer(task: Task, network: nn.Module, fuse: bool = True, bf16: bool = False) -> Trainer:
    """Of a network that is converted in place."""
    import fedpai_kernels

    dtype = torch.bfloat16 if bf16 else None
    start = time.perf_counter()
    report = fedpai_kernels.sparsify_(network, task.masks, fuse=fuse, activation_dtype=dtype)
    convert_ms = 1e3 * (time.perf_counter() - start)
    kernels = [row.kernel for row in report]
    layers = {kernel: kernels.count(kernel) for kernel in sorted(set(kernels))}
    return Trainer(
        network,
        network,
        task.images,
        task.labels,
        masked=True,
        layers=layers,
        sgd=fedpai_kernels.optim.SGD,
        exact=not bf16,
        convert_ms=convert_ms,
    )


def _dense(task: Task, compiled: bool) -> dict[str, Build]:
    builds: dict[str, Build] = {}
    torch.compiler.reset()  # past a number of compiled forms, torch would quietly run a network eagerly
    for name in FORMATS:
        for mode in ("eager", "compiled") if compiled else ("eager",):

            def build(name: str = name, mode: str = mode) -> Trainer:
                trainer = dense_trainer(task, copy.deepcopy(task.network), name)
                if mode == "compiled":
                    trainer.network = torch.compile(trainer.network, dynamic=False)
                return trainer

            builds[f"{name}, {mode}"] = build
    return builds


def dense_trainer(task: Task, network: nn.Module, memory_format: str) -> Trainer:
    """Of a network that is brought into one of :data:`FORMATS` in place."""
    _in_format(network, FORMATS[memory_format])
    images = task.images.contiguous(memory_format=FORMATS[memory_format])
    return Trainer(network, network, images, task.labels)


def _sparseprop(task: Task, compiled: bool) -> dict[str, Build]:
    def build() -> Trainer | str:
        if not installed():
            return "not installed"
        from sparseprop.modules import SparseConv2d, SparseLinear
        from sparseprop.utils import swap_modules_with_sparse

        # What it would convert wrongly, or not at all, stays dense.
        convs = ((n, m) for n, m in task.network.named_modules() if isinstance(m, nn.Conv2d))
        skipped = [name for name, conv in convs if unsupported(case_of(name, conv, task.images.shape))]
        # It chooses between dense and sparse by one timed call, so the first conversion only warms up.
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()):
                network: nn.Module = swap_modules_with_sparse(
                    task.network, tuple(task.images.shape), skip_modules=",".join(skipped)
                )
        swapped = sum(isinstance(module, SparseConv2d | SparseLinear) for module in network.modules())
        if not swapped:
            return "it swapped no layer"
        # What it leaves dense is trained outside of its mask as well, so later losses may differ.
        return Trainer(network, network, task.images, task.labels, masked=swapped == len(task.masks))

    return {"swap_modules_with_sparse": build}


CONTENDERS: dict[str, Callable[[Task, bool], dict[str, Build]]] = {
    "ours": _ours,
    "dense": _dense,
    "sparseprop": _sparseprop,
}


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _in_format(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    return network.to(memory_format=memory_format)  # type: ignore[call-overload]


# ---- the losses that everybody must show first ----------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """First losses of dense torch with masked weights and masked gradients.

    Attributes:
        losses: in contiguous tensors.
        spread: how far those in channels_last are away.
    """

    losses: list[float]
    spread: list[float]

    def problem(self, found: list[float], masked: bool, exact: bool = True) -> str:
        """What is wrong with a contender's first losses; empty if they agree. Without masks, or with rounded
        gradients, only the first can.
        """
        for number, (loss, expected, spread) in enumerate(
            zip(found, self.losses, self.spread, strict=True), 1
        ):
            tolerance = _FORMATS_APART * spread + _ROUNDING * abs(expected)
            if not abs(loss - expected) <= tolerance:  # catches NaN
                return f"loss of step {number} is {loss:.7g}, dense torch with a mask has {expected:.7g}"
            if not (masked and exact):
                break
        return ""


def masked_losses(task: Task) -> Expected:
    """The first losses of the task, trained by dense torch under its masks."""
    runs = []
    for memory_format in FORMATS.values():
        network = _in_format(copy.deepcopy(task.network), memory_format)
        for name, mask in task.masks.items():
            own = mask.to(task.images.device)
            network.get_parameter(f"{name}.weight").register_hook(lambda gradient, own=own: gradient * own)
        trainer = Trainer(
            network, network, task.images.contiguous(memory_format=memory_format), task.labels, masked=True
        )
        runs.append([float(trainer.step()) for _ in range(CHECKED_STEPS)])
    plain, other = runs
    return Expected(plain, [abs(a - b) for a, b in zip(plain, other, strict=True)])
