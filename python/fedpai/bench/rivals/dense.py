# SPDX-License-Identifier: Apache-2.0
"""Dense torch. It computes with a plain weight: the multiplication by a mask is not charged to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fedpai.bench.rivals.base import Contender, Problem


def build(problem: Problem) -> list[Contender]:
    """Contiguous and channels_last, and both compiled where the problem asks for it."""
    case, plan = problem.case, problem.plan

    def conv2d(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight)

    def pack(gradient: Tensor) -> Tensor:
        return plan.pack(gradient.float().cpu())

    apply = linear if case.kind == "linear" else conv2d
    formats = {"contiguous": torch.contiguous_format}
    # With few channels, torch 2.13.0 writes past its buffers in the backward pass of a strided 1x1 convolution in
    # channels_last ("corrupted size vs. prev_size"); seen below 8 channels, kept away from all ragged numbers.
    corrupts = case.kernel == (1, 1) and case.stride != (1, 1) and case.in_channels % 8 != 0
    if case.kind == "conv2d" and not corrupts:
        formats["channels_last"] = torch.channels_last
    found = []
    for name, memory_format in formats.items():
        x, weight, dy = (
            t.to(problem.place, problem.x.dtype).contiguous(memory_format=memory_format)
            for t in (problem.x, problem.weight, problem.dy)
        )
        found.append(Contender(name, apply, x, weight, dy, packed=pack))
        if problem.compiled:
            found.append(Contender(f"{name}, compiled", _compiled(apply), x, weight, dy, packed=pack))
    return found


def _compiled(apply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    import torch._functorch.config as functorch_config

    # The backward pass is timed again and again on one graph, so it may not reuse that graph's buffers.
    functorch_config.donated_buffer = False
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(apply, dynamic=False)
    return compiled
