# SPDX-License-Identifier: Apache-2.0
"""SparseProp (Nikdan et al., arXiv 2302.04852; package ``sparseprop``): unstructured sparse training on CPUs.

Its two convolutions are both measured, each on tensors in the layout it works in, so that it never permutes:
over the batch on batch-last tensors, over the output width on contiguous ones (it reads others wrongly). Inside a
network torch's batch norm hands it contiguous tensors; the rival "sparseprop-contiguous" is measured so. Both
gradients come from one sweep and cannot be had one without the other. Threads are those of torch, whose OpenMP
runtime it shares when torch is imported first.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from fedpai.bench.cases import LayerCase
from fedpai.bench.rivals.base import Contender, Problem, Unavailable
from fedpai_kernels import to_batch_last


def installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("sparseprop") is not None


def build(problem: Problem, contiguous: bool = False) -> list[Contender]:
    """Both variants of a convolution, or its linear layer.

    Args:
        problem: the layer.
        contiguous: give both variants contiguous tensors.

    Raises:
        Unavailable: not installed, or a layer that it would convert without complaint and compute wrongly.
    """
    if not installed():
        raise Unavailable("not installed")
    case = problem.case
    if case.kind == "linear":
        return [_linear(problem)]
    if reason := unsupported(case):
        raise Unavailable(reason)
    return [_conv2d(problem, over_width, contiguous) for over_width in (False, True)]


def unsupported(case: LayerCase) -> str:
    """Why it cannot compute a convolution; empty if it can."""
    if case.groups != 1:
        return "has no groups"
    if case.kernel[0] != case.kernel[1] or case.padding[0] != case.padding[1] or case.dilation != (1, 1):
        return "has square kernels, one padding and no dilation only"
    if case.stride not in ((1, 1), (2, 2)):
        return "has strides 1 and 2 only"
    return ""


def _conv2d(problem: Problem, over_width: bool, contiguous: bool) -> Contender:
    from sparseprop.modules.conv2d import SparseConv2d
    from sparseprop.modules.functions import SparseConvFunction

    case = problem.case
    module = SparseConv2d(
        problem.weight, padding=case.padding[0], stride=case.stride[0], vectorizing_over_on=over_width
    )
    indices, forward_over_width = module.W_idx, module.vectorizing_fwd_over_on

    def apply(x: Tensor, values: Tensor) -> Tensor:
        y: Tensor = SparseConvFunction.apply(
            x, values, indices, None, module.OC, module.K, module.padding, module.stride, forward_over_width,
            over_width,
        )  # fmt: skip
        return y

    x, dy = problem.x, problem.dy
    if not over_width and not contiguous:
        x, dy = to_batch_last(x), to_batch_last(dy)
    name = "over width" if over_width else "over batch"
    return Contender(name, apply, x, module.W_val, dy, separable=False)


def _linear(problem: Problem) -> Contender:
    from sparseprop.modules.linear import SparseLinear, SparseLinearFunction

    module = SparseLinear(problem.weight)
    indices, outputs = module.W_idx, module.N

    def apply(x: Tensor, values: Tensor) -> Tensor:
        y: Tensor = SparseLinearFunction.apply(x, values, indices, None, outputs)
        return y

    return Contender("csr", apply, problem.x, module.W_val, problem.dy, separable=False)
