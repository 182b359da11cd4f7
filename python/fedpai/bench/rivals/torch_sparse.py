# SPDX-License-Identifier: Apache-2.0
"""torch.sparse: CSR times dense, where a layer is a matrix product: linear layers and 1x1 convolutions.

Torch's own autograd makes a dense gradient of a CSR matrix. Here each direction is the best that torch has for
it: two CSR products and ``sampled_addmm`` at the weights that exist. Convolutions work on batch-last tensors,
which are matrices (channels, pixels x batch) without a copy; a stride takes its pixels out first.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fedpai.bench.rivals.base import Contender, Problem, Unavailable
from fedpai_kernels import to_batch_last


def build(problem: Problem) -> list[Contender]:
    """One variant.

    Raises:
        Unavailable: a convolution that is no matrix product.
    """
    case = problem.case
    if case.kernel != (1, 1) or case.padding != (0, 0) or case.groups != 1:
        raise Unavailable("has no convolution; 1x1 and linear layers only")
    product = _Product(problem)

    def linear(x: Tensor, values: Tensor) -> Tensor:
        return _Csr.apply(x.t(), values, product).t()

    def conv2d(x: Tensor, values: Tensor) -> Tensor:
        pixels = x[:, :, :: case.stride[0], :: case.stride[1]].permute(1, 2, 3, 0)
        y = _Csr.apply(pixels.reshape(case.in_channels, -1), values, product)
        return y.view(case.out_channels, *case.output, -1).permute(3, 0, 1, 2)

    apply = linear if case.kind == "linear" else conv2d
    x, dy = to_batch_last(problem.x), to_batch_last(problem.dy)
    return [Contender("csr", apply, x, problem.values, dy)]


class _Product:
    """A weight matrix in CSR and its transpose, with the order of the transpose's values."""

    def __init__(self, problem: Problem) -> None:
        mask = problem.mask.reshape(problem.mask.shape[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch announces that CSR is in beta state
            self._matrix = _pattern(mask)
            self._transposed = _pattern(mask.t())
        number = torch.zeros(mask.shape, dtype=torch.int64)
        number[mask] = torch.arange(problem.plan.nnz)
        self._order = number.t()[mask.t()]

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return _with_values(self._matrix, values) @ x

    def input_gradient(self, dy: Tensor, values: Tensor) -> Tensor:
        return _with_values(self._transposed, values[self._order]) @ dy

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        return torch.sparse.sampled_addmm(self._matrix, dy, x.t(), beta=0.0).values()


def _pattern(mask: Tensor) -> Tensor:
    return mask.float().to_sparse_csr()


def _with_values(pattern: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(
        pattern.crow_indices(), pattern.col_indices(), values, pattern.shape, check_invariants=False
    )


class _Csr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, product: _Product) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.product = product
        return product.forward(x, values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        dx = ctx.product.input_gradient(dy, values) if ctx.needs_input_grad[0] else None
        dvalues = ctx.product.weight_gradient(x, dy) if ctx.needs_input_grad[1] else None
        return dx, dvalues, None
