# SPDX-License-Identifier: Apache-2.0
"""Block-sparse linear layer on a GPU: a convolution of 1 x 1 images, with the rows of x as the batch.

It has no kernel of its own: Triton compiles integers that are 1 as constants, so that image, tap and stride disappear
from the kernel of a convolution of 1 x 1 images, and a matrix product over the list of blocks is left.
"""

from __future__ import annotations

from torch import Tensor

from ..ops.linear import GEOMETRY, check_linear
from ..plan import Plan
from .block_conv2d import checked_setting, differentiable_block_conv2d
from .runtime import HALF_OR_SINGLE


def block_linear(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    *,
    block: int | None = None,
    precision: str = "ieee",
) -> Tensor:
    """:func:`fedpai_kernels.ops.sparse_linear` for a mask of whole blocks, on a GPU.

    Differentiable, deterministic and exact about masked weights as :func:`block_conv2d` is.

    Args:
        x: (..., in), float32, float16 or bfloat16, any strides; rows without gaps, and a 2-D x that is stored (in, N),
            are read in place.
        values: (plan.nnz,), the surviving weights in row-major order of the mask.
        plan: of kind "linear", of a mask made of whole blocks.
        bias: (out,) or None.
        block, precision: as of :func:`block_conv2d`.

    Returns:
        (..., out). A 2-D result is stored (out, N) if x is stored (in, N), else in rows.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`block_conv2d`.
    """
    check_linear(x, values, plan, bias, HALF_OR_SINGLE)
    setting = checked_setting(plan, block, precision, GEOMETRY)
    out_features, in_features = plan.mask_shape
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    images = rows.unsqueeze(2).unsqueeze(3)
    y = differentiable_block_conv2d(images, values, bias, plan, setting).squeeze(3).squeeze(2)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)
