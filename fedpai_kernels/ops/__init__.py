# SPDX-License-Identifier: Apache-2.0
"""The sparse ops as functions. Each has a dense twin in :mod:`fedpai_kernels.ops.reference`."""

from . import reference
from .conv2d import sparse_conv2d
from .linear import sparse_linear

__all__ = ["reference", "sparse_conv2d", "sparse_linear"]
