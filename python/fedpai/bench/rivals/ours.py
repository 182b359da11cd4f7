# SPDX-License-Identifier: Apache-2.0
"""This project's kernels, on batch-last tensors, as they meet them inside a converted network."""

from __future__ import annotations

from torch import Tensor

from fedpai.bench.rivals.base import Contender, Problem
from fedpai_kernels import to_batch_last
from fedpai_kernels.ops import sparse_conv2d, sparse_linear


def build(problem: Problem) -> list[Contender]:
    """The sparse kernel, whether or not a conversion would choose it for this density."""
    case, plan = problem.case, problem.plan

    def conv2d(x: Tensor, values: Tensor) -> Tensor:
        return sparse_conv2d(x, values, plan, None, case.stride, case.padding, case.dilation, case.groups)

    def linear(x: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, values, plan)

    apply = linear if case.kind == "linear" else conv2d
    x, dy = (to_batch_last(t.to(problem.place)) for t in (problem.x, problem.dy))
    return [Contender("sparse", apply, x, problem.values.to(problem.place), dy)]
