# SPDX-License-Identifier: Apache-2.0
"""The three ops of the sparse convolution for CUDA tensors: what :mod:`fedpai_kernels.ops.conv2d` defines, by whichever
candidate is fastest in that direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.conv2d_kernels import image_size
from ..ops.registry import LIBRARY
from ..plan import plan_of
from .candidates import ALL
from .chooser import Chooser
from .file import TimesFile
from .timing import EventTimer


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


CHOOSER = Chooser(ALL, EventTimer(), TimesFile(), _is_capturing)


def forward(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    arguments = x, values, bias, plan, geometry
    y: Tensor = CHOOSER.run("forward", plan_of(plan), geometry, image_size(x), (x,), arguments)
    return y


def input_grad(dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]) -> Tensor:
    arguments = dy, values, plan, height, width, geometry
    dx: Tensor = CHOOSER.run("input_grad", plan_of(plan), geometry, (height, width), (dy,), arguments)
    return dx


def weight_grad(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    arguments = x, dy, plan, with_bias, geometry
    grads: tuple[Tensor, Tensor] = CHOOSER.run(
        "weight_grad", plan_of(plan), geometry, image_size(x), (x, dy), arguments
    )
    return grads


LIBRARY.impl("conv2d_forward", forward, "CUDA")
LIBRARY.impl("conv2d_input_grad", input_grad, "CUDA")
LIBRARY.impl("conv2d_weight_grad", weight_grad, "CUDA")
