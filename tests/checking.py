# SPDX-License-Identifier: Apache-2.0
"""`check_op`: one case against the float64 reference, output and all gradients, over layouts of every operand.

The rules are those of docs/numerics.md. Exact regime: operands are small integers, so every partial sum is exact and
the results must be equal bit for bit. Rounded regime: random normal operands, and an error of at most twice (weight
gradient: three times) that of dense masked torch in the same dtype, plus a few epsilon of the result's magnitude. There
the errors of float64 results are measured from sums in extended precision (tests/direct.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpai_kernels import compiled_isas, is_batch_last
from fedpai_kernels.ops.geometry import resolve_geometry
from tests.cases import DTYPES, Case, Conv2dCase
from tests.direct import DirectResults, direct_conv2d

# How often dense torch's own error a result may err, by direction, and the floor in epsilon of the largest element.
ERROR_FACTOR = {"fwd": 2.0, "dx": 2.0, "dw": 3.0, "db": 3.0}
FLOOR_EPSILONS = 4.0

_EXACT_LIMIT = {"f32": 2**24, "f64": 2**53}
_LARGEST_INTEGER = 4


def runs(cases: Sequence[Case], dtypes: Sequence[str] = tuple(DTYPES)) -> pytest.MarkDecorator:
    """Parametrises (case, dtype, isa) over all compiled instruction sets, with the kernels' names as ids."""
    return pytest.mark.parametrize(
        ("case", "dtype", "isa"),
        [
            pytest.param(case, dtype, isa, id=f"{case.kernel_name('step', dtype, isa)}-{case.name}")
            for case in cases
            for dtype in dtypes
            for isa in compiled_isas()
        ],
        indirect=["isa"],
    )


# -------------------------------------------------------------------------------------------------------- layouts


def _islands(t: Tensor, order: Sequence[int], pitch: int, offset: int) -> Tensor:
    """A copy of `t` stored in `order` of its dimensions, outermost first, in a sea of NaN.

    Rows of the innermost dimension are `pitch` elements longer than needed, and the first element lies `offset`
    elements into the storage. Whatever reads between the islands, and uses it, gives NaN.
    """
    strides = [0] * t.dim()
    step = 1
    for i, dimension in enumerate(reversed(order)):
        strides[dimension] = step
        step *= t.shape[dimension] + (pitch if i == 0 else 1 if pitch else 0)
    sea = torch.full((step + offset + 64,), float("nan"), dtype=t.dtype)
    view = sea.as_strided(t.shape, strides, offset)
    view.copy_(t)
    return view


def _innermost_two_apart(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t.clone()
    sea = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    sea[..., ::2] = t
    return sea[..., ::2]


def _batch_last_order(t: Tensor) -> list[int]:
    return [*range(1, t.dim()), 0]


# Every way in which x or the output gradient may be stored. All hold the same numbers.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_last": lambda t: _islands(t, _batch_last_order(t), 0, 0) if t.dim() else t,
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else _islands(t, range(t.dim()), 0, 1)
    ),
    "gaps": lambda t: _islands(t, range(t.dim()), 3, 5),
    "every_other": _innermost_two_apart,
    "batch_last_gaps": lambda t: _islands(t, _batch_last_order(t), 3, 0),
    # A quarter of a vector: two floats of eight, or one double of four.
    "misaligned_by_quarter": lambda t: _islands(t, _batch_last_order(t), 0, 8 // t.element_size()),
    "reversed_order": lambda t: _islands(t, list(reversed(range(t.dim()))), 0, 0),
}


# ------------------------------------------------------------------------------------------------------- operands


class Operands(NamedTuple):
    x: Tensor
    values: Tensor
    bias: Tensor | None
    dy: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


class Results(NamedTuple):
    """By direction; db is None without a bias."""

    fwd: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


def operands(case: Case, dtype: str, regime: str, client: int = 0) -> Operands:
    """Integers of at most 4, or normal numbers of the dtype. Clients have the mask in common, and no numbers."""
    generator = case.generator()
    generator.manual_seed(generator.initial_seed() + client)

    def draw(*shape: int) -> Tensor:
        if regime == "exact":
            limits = (-_LARGEST_INTEGER, _LARGEST_INTEGER + 1)
            return torch.randint(*limits, shape, generator=generator).to(DTYPES[dtype])
        return torch.randn(shape, generator=generator, dtype=DTYPES[dtype])

    bias = draw(case.mask_shape[0]) if case.bias else None
    return Operands(draw(*case.input_shape), draw(case.plan.nnz), bias, draw(*case.output_shape))


def stacked(clients: Sequence[Operands]) -> Operands:
    """Those of all clients, with a first dimension for the client."""
    return Operands(*(None if ts[0] is None else torch.stack(ts) for ts in zip(*clients, strict=True)))  # type: ignore[arg-type, type-var]


def differentiate(
    op: Callable[[Tensor, Tensor, Tensor | None], Tensor], given: Operands, dy: Tensor | None = None
) -> Results:
    """Output and gradients of `op`, for the output gradient `dy` or the operands' own."""
    x, values, bias = (None if t is None else t.detach().requires_grad_() for t in given[:3])
    assert x is not None
    assert values is not None
    y = op(x, values, bias)
    y.backward(given.dy if dy is None else dy)
    assert x.grad is not None
    assert values.grad is not None
    return Results(y.detach(), x.grad, values.grad, None if bias is None else bias.grad)


def direct(case: Case, given: Operands) -> DirectResults:
    """The case's results in extended precision; a linear layer is a convolution of 1 x 1 images."""
    mask = case.plan.mask()
    x, dy = given.x, given.dy
    if isinstance(case, Conv2dCase):
        geometry = resolve_geometry(case.kernel, case.stride, case.padding, case.dilation)
        groups = case.groups
    else:
        geometry, groups = resolve_geometry((1, 1), 1, 0, 1), 1
        mask = mask[:, :, None, None]
        x, dy = (t.reshape(-1, t.shape[-1], 1, 1) for t in (x, dy))
    result = direct_conv2d(
        x.numpy(), given.values.numpy(), mask.numpy(), None if given.bias is None else given.bias.numpy(), dy.numpy(),
        geometry.stride, geometry.pad_front, geometry.dilation, groups,
    )  # fmt: skip
    return result._replace(fwd=result.fwd.reshape(given.dy.shape), dx=result.dx.reshape(given.x.shape))


class Expectation(NamedTuple):
    """What a result is judged by: the truth as far as it is known, and how far dense torch is from it."""

    given: Operands
    exact: Results  # float64
    truth: DirectResults | Results
    dense_error: dict[str, float]


def _error(got: Tensor, truth: np.ndarray | Tensor) -> np.ndarray:
    wide = truth.numpy() if isinstance(truth, Tensor) else truth
    return np.abs(got.numpy().astype(wide.dtype) - wide)


@lru_cache(maxsize=512)
def _expectation(case: Case, dtype: str, regime: str, expanded: bool) -> Expectation:
    given = operands(case, dtype, regime)
    if expanded:
        given = given._replace(dy=_constant(given.dy))
    exact = differentiate(case.dense, given.to(torch.float64))
    if regime == "exact":
        return Expectation(given, exact, exact, {})
    truth = exact if dtype == "f32" else direct(case, given)
    dense = differentiate(case.dense, given)
    errors = {
        direction: float(_error(result, getattr(truth, direction)).max())
        for direction, result in dense._asdict().items()
        if result is not None
    }
    return Expectation(given, exact, truth, errors)


def _constant(dy: Tensor) -> Tensor:
    """The gradient that a plain sum() sends back, scaled: one element, seen everywhere with stride 0."""
    return torch.tensor(3.0, dtype=dy.dtype).expand(dy.shape)


# --------------------------------------------------------------------------------------------------------- checks


def _compare(where: str, direction: str, got: Tensor, expectation: Expectation) -> None:
    truth = getattr(expectation.truth, direction)
    dtype = expectation.given.x.dtype
    assert tuple(got.shape) == tuple(truth.shape), f"{where}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == dtype, f"{where}: dtype {got.dtype}, expected {dtype}"
    difference = _error(got, truth)
    bound = 0.0
    if expectation.dense_error:
        magnitude = getattr(expectation.exact, direction).abs().max().item()
        floor = FLOOR_EPSILONS * torch.finfo(dtype).eps * magnitude
        bound = ERROR_FACTOR[direction] * expectation.dense_error[direction] + floor
    if (difference <= bound).all():  # False for NaN
        return
    bad = np.argwhere(~(difference <= bound))
    at = tuple(int(i) for i in bad[0])
    pytest.fail(
        f"{where}: {len(bad)} of {got.numel()} elements are off by more than {bound:.3g}, the worst by "
        f"{float(difference.max()):.3g}; the first at {at}: got {got[at].item()!r}, expected {float(truth[at])!r}",
        pytrace=False,
    )


def check_op(
    case: Case,
    dtype: str,
    isa: str,
    *,
    regime: str = "exact",
    x_layouts: Sequence[str] = ("batch_last",),
    dy_layouts: Sequence[str] = ("batch_last",),
    expanded: bool = True,
) -> None:
    """Output, dx, dvalues and dbias of the sparse op against the reference, for every pair of layouts named.

    `expanded` adds the gradient of a plain sum, which has one element and stride 0.
    """
    if regime == "exact":
        largest = case.longest_sum * _LARGEST_INTEGER**2
        assert largest < _EXACT_LIMIT[dtype], "the case is too large for exact sums"
    gradients: list[tuple[str, bool]] = [(layout, False) for layout in dy_layouts]
    if expanded:
        gradients.append(("expanded", True))
    for dy_layout, is_constant in gradients:
        expectation = _expectation(case, dtype, regime, is_constant)
        given = expectation.given
        for x_layout in x_layouts:
            moved = given._replace(x=LAYOUTS[x_layout](given.x))
            dy = given.dy if is_constant else LAYOUTS[dy_layout](given.dy)
            got = differentiate(case.sparse, moved, dy)
            if case.op == "conv2d" or got.fwd.dim() == 2:
                assert is_batch_last(got.fwd), f"y is not batch-last: strides {got.fwd.stride()}"
            for direction, result in got._asdict().items():
                if result is None:
                    continue
                kernel = case.kernel_name("dw" if direction == "db" else direction, dtype, isa)
                where = f"{kernel} {case.name} {direction}, x {x_layout}, dy {dy_layout}, {regime}"
                _compare(where, direction, result, expectation)
