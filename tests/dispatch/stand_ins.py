# SPDX-License-Identifier: Apache-2.0
"""A dispatcher whose device is the CPU: candidates that run there, a timer that tells what it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpai_kernels.dispatch import candidates, layers
from fedpai_kernels.dispatch.candidates import DENSE, Candidate
from fedpai_kernels.dispatch.chooser import Chooser
from fedpai_kernels.dispatch.file import TimesFile
from fedpai_kernels.dispatch.timing import Run
from fedpai_kernels.ops import conv2d, conv2d_kernels
from fedpai_kernels.plan import Plan


def _anything(plan: Plan, images: Tensor) -> None:
    pass


# The CPU's kernels in place of the CUDA kernels, which have the same ops.
SPARSE = Candidate(
    "sparse", _anything, conv2d_kernels._forward_cpu, conv2d_kernels._input_grad_cpu, conv2d_kernels._weight_grad_cpu
)
ABSENT = dataclasses.replace(candidates.BLOCKS, check=lambda plan, images: _refuse())

MACHINE: dict[str, str | int] = {"device": "Stand-in", "capability": "0.0", "torch": "1"}


def _refuse() -> None:
    raise RuntimeError("there are no blocks here; install them")


class ToldTimer:
    """Microseconds by direction and name. Counts how often it is asked."""

    def __init__(self, told: Mapping[str, Mapping[str, float]]) -> None:
        self.told, self.asked = told, 0

    def microseconds(self, runs: Sequence[Run]) -> list[float]:
        self.asked += 1
        found = []
        for run in runs:
            run()
            op = run.func  # type: ignore[attr-defined]
            [where] = [
                (direction, candidate.name)
                for candidate in (SPARSE, DENSE)
                for direction in self.told
                if getattr(candidate, direction) is op
            ]
            found.append(self.told[where[0]][where[1]])
        return found


ALL_SPARSE = {direction: {"sparse": 1.0, "dense": 2.0} for direction in ("forward", "input_grad", "weight_grad")}
MIXED = {
    "forward": {"sparse": 10.0, "dense": 20.5},
    "input_grad": {"sparse": 30.0, "dense": 20.0},
    "weight_grad": {"sparse": 50.0, "dense": 40.0},
}


def chooser(timer: ToldTimer, facts: Mapping[str, str | int] = MACHINE, **settings: Any) -> Chooser:
    is_capturing: Callable[[], bool] = settings.pop("is_capturing", lambda: False)
    own: Sequence[Candidate] = settings.pop("own", (SPARSE, ABSENT, DENSE))
    assert not settings
    return Chooser(own, timer, TimesFile(lambda device: facts), is_capturing)


def install(monkeypatch: pytest.MonkeyPatch, made: Chooser) -> Chooser:
    """Layers on the CPU go by this chooser."""
    monkeypatch.setattr(layers, "CHOOSER", made)
    monkeypatch.setattr(conv2d, "conv2d_forward", layers.forward)
    monkeypatch.setattr(conv2d, "conv2d_input_grad", layers.input_grad)
    monkeypatch.setattr(conv2d, "conv2d_weight_grad", layers.weight_grad)
    monkeypatch.setattr(conv2d, "has_backward", lambda t: False)
    return made


def calls(made: Chooser, plan: Plan) -> dict[str, str]:
    """Candidates by direction."""
    return {call.direction: choice.candidate for call, choice in made.choices(plan).items()}


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)
