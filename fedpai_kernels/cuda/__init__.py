# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: loaded lazily, launched on torch's current stream, never waited for.

:mod:`fedpai_kernels.dispatch` brings layers here, where they are faster so; the batch norms of ``ops/norm.py``,
:mod:`fedpai_kernels.optim` and :mod:`fedpai_kernels.aggregate` come here by themselves for CUDA tensors. docs/gpu.md
says how to get the library and what was checked of it.
"""

from . import norm  # noqa: F401  registers the ops
from .aggregate import Positions, majority, masked_mean, server_step, weighted_mean
from .library import CudaUnavailableError
from .optim import adam_step, sgd_step

__all__ = [
    "CudaUnavailableError",
    "Positions",
    "adam_step",
    "is_available",
    "majority",
    "masked_mean",
    "server_step",
    "sgd_step",
    "weighted_mean",
]


def is_available() -> bool:
    """Whether the CUDA kernels can be used: the library is there, and so are a driver and a device."""
    from .library import load

    try:
        load()
    except CudaUnavailableError:
        return False
    return True
