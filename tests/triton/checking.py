# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of tests/cases.py through the Triton kernels: on a GPU, or in Triton's interpreter on the CPU.

The rules are those of tests/checking.py, with float16 and bfloat16 beside float32. Sums are float32 whatever the
operands are, so a result of 16 bits may err as one of float32 and by one epsilon of its own besides: it is rounded
once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fedpai_kernels.triton import block_conv2d, block_linear
from tests.cases import Case, Conv2dCase
from tests.checking import ERROR_FACTOR, FLOOR_EPSILONS, LAYOUTS, Operands, Results, differentiate, operands

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed (the extra `triton`)")

needs_kernels = pytest.mark.skipif(
    not INSTALLED or (DEVICE == "cpu" and not INTERPRETED),
    reason="no GPU; tests/triton/test_interpreter.py runs it in Triton's interpreter, if Triton is installed",
)

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def block_op(case: Case, precision: str = "ieee") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The op under test, as `differentiate` takes it."""
    if isinstance(case, Conv2dCase):
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        return lambda x, values, bias: block_conv2d(x, values, case.plan, bias, *geometry, precision=precision)
    return lambda x, values, bias: block_linear(x, values, case.plan, bias, precision=precision)


def moved(given: Operands, x_layout: str, dy: Tensor, dy_layout: str) -> Operands:
    """On the device, x and dy stored as the layouts say."""

    def stored(t: Tensor, layout: str) -> Tensor:
        if DEVICE == "cpu":
            return LAYOUTS[layout](t)
        there = torch.empty_strided(t.shape, LAYOUTS[layout](t).stride(), dtype=t.dtype, device=DEVICE)
        return there.copy_(t)

    x = stored(given.x, x_layout)
    bias = None if given.bias is None else given.bias.to(DEVICE)
    dy = dy.to(DEVICE) if dy_layout == "expanded" else stored(dy, dy_layout)
    return Operands(x, given.values.to(DEVICE), bias, dy)


def check_block_op(
    case: Case,
    dtype: str,
    *,
    regime: str = "exact",
    x_layout: str = "batch_last",
    dy_layouts: Sequence[str] = ("batch_last",),
) -> None:
    """Output, dx, dvalues and dbias against the float64 reference. `dy_layouts`: may name "expanded", stride 0."""
    given = operands(case, "f32", regime).to(TYPES[dtype])
    for dy_layout in dy_layouts:
        dy = torch.tensor(3.0, dtype=given.dy.dtype).expand(given.dy.shape) if dy_layout == "expanded" else given.dy
        exact = differentiate(case.dense, given._replace(dy=dy).to(torch.float64))
        dense = differentiate(case.dense, given._replace(dy=dy).to(torch.float32)) if regime == "rounded" else None
        there = moved(given, x_layout, dy, dy_layout)
        got = differentiate(block_op(case), there)
        for direction in Results._fields:
            result, truth = getattr(got, direction), getattr(exact, direction)
            if truth is None:
                assert result is None
                continue
            where = f"{case.op}_{direction} {case.name} {dtype} {regime}, x {x_layout}, dy {dy_layout}"
            error = None if dense is None else (getattr(dense, direction).double() - truth).abs().max().item()
            _compare(where, direction, result, truth, there.x.dtype, error)


def _cut(truth: Tensor) -> Tensor:
    """As the interpreter stores bfloat16: it cuts off the bits that a GPU rounds. (Bias gradients are torch's sums.)"""
    return (truth.float().view(torch.int32) & -(1 << 16)).view(torch.float32)


def _compare(
    where: str, direction: str, got: Tensor, truth: Tensor, dtype: torch.dtype, dense_error: float | None
) -> None:
    assert got.shape == truth.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == dtype, f"{where}: dtype {got.dtype}, expected {dtype}"
    if dense_error is None:
        expected = _cut(truth) if INTERPRETED and dtype == torch.bfloat16 and direction != "db" else truth.to(dtype)
        difference, bound = (got.cpu().double() - expected.double()).abs(), 0.0
    else:
        difference = (got.cpu().double() - truth).abs()
        epsilons = FLOOR_EPSILONS if dtype == torch.float32 else 1.0
        floor = epsilons * torch.finfo(dtype).eps * truth.abs().max().item()
        bound = ERROR_FACTOR[direction] * dense_error + floor
    if bool((difference <= bound).all()):  # False for NaN
        return
    bad = (~(difference <= bound)).nonzero()
    at = tuple(bad[0].tolist())
    pytest.fail(
        f"{where}: {len(bad)} of {got.numel()} elements are off by more than {bound:.3g}, the worst by "
        f"{float(difference.max()):.3g}; the first at {at}: got {got[at].item()!r}, expected {truth[at].item()!r}",
        pytrace=False,
    )
