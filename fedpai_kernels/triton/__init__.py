# SPDX-License-Identifier: Apache-2.0
"""Block-sparse layers, merging and optimiser steps on GPUs, as kernels that Triton compiles.

    from fedpai_kernels import Plan, triton

    plan = Plan.from_mask(mask, structure="32x32")
    y = triton.block_conv2d(x, values, plan, padding=1)          # x on a GPU, float32, float16 or bfloat16

Needs the extra: ``pip install 'fedpai-kernels[triton]'``. Importing this package does not import Triton; calling a
function without it is an error that says so. docs/triton.md says what is computed how.
"""

from . import aggregate, optim
from .block_conv2d import block_conv2d
from .block_linear import block_linear
from .block_plan import BLOCKS, BlockPlan

__all__ = ["BLOCKS", "BlockPlan", "aggregate", "block_conv2d", "block_linear", "optim"]
