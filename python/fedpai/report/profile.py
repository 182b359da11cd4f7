# SPDX-License-Identifier: Apache-2.0
"""Time of every conv and linear layer, dense and sparse, on one batch of the run.

Each layer is timed alone, forward and backward, on the input it really gets inside the network. The two
forms take turns within every repetition, so that a machine that changes speed changes both.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerTime:
    """One layer.

    Attributes:
        name, shape: module name and weight shape.
        input: input shape, batch first.
        dense_ms, sparse_ms: median of forward + backward (input gradient, except in the first layer, and
            parameter gradients).
    """

    name: str
    shape: tuple[int, ...]
    input: tuple[int, ...]
    dense_ms: float
    sparse_ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "shape": list(self.shape), "input": list(self.input)}


def profile_layers(dense: nn.Module, sparse: nn.Module, x: Tensor, repeats: int = 5) -> list[LayerTime]:
    """Times each conv and linear layer of two forms of one network.

    Args:
        dense: the plain network, in the memory format it trains in.
        sparse: the same network after `sparsify_`; module names agree, channels may have been removed.
        x: a batch, float32 (N, C, H, W), in the dense network's memory format.
        repeats: timed repetitions after one that is thrown away.
    """
    import fedpai_kernels

    inputs, thin_inputs = _inputs(dense, x), _inputs(sparse, x)
    times = []
    for name, (given, first) in inputs.items():
        plain, thin = dense.get_submodule(name), sparse.get_submodule(name)
        packed = thin_inputs[name][0]
        packed = fedpai_kernels.to_batch_last(packed) if packed.dim() == 4 else packed
        samples: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1):
            for module, form, kept in ((plain, given, samples[0]), (thin, packed, samples[1])):
                seconds = _forward_backward(module, form, wants_input_gradient=not first)
                if repeat:
                    kept.append(1e3 * seconds)
        shape = tuple(dict(plain.named_parameters())["weight"].shape)
        times.append(LayerTime(name, shape, tuple(given.shape), median(samples[0]), median(samples[1])))
    return times


def _inputs(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, bool]]:
    """The input of every conv and linear layer, and whether the layer runs first, in running order."""
    from fedpai_kernels.nn import PackedWeight

    seen: dict[str, tuple[Tensor, bool]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | PackedWeight):

            def record(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = (given[0].detach().clone(), not seen)

            handles.append(module.register_forward_pre_hook(record))
    try:
        with torch.no_grad():
            model.train()(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _forward_backward(module: nn.Module, given: Tensor, *, wants_input_gradient: bool) -> float:
    leaf = given.detach().requires_grad_(wants_input_gradient)
    with torch.no_grad():
        upstream = torch.randn_like(module(leaf))
    for parameter in module.parameters():
        parameter.grad = None
    start = time.perf_counter()
    module(leaf).backward(upstream)
    return time.perf_counter() - start
