# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors: which kernels compute a masked layer, direction by direction.

    print(fedpai_kernels.report(model))            # after a step: what was chosen for each layer, and why
    with fedpai_kernels.dispatch.backend("dense"): # not by measurement
        ...

:func:`fedpai_kernels.ops.sparse_conv2d`, ``sparse_linear`` and the modules come here by themselves. docs/gpu.md says
how a choice is made.
"""

from contextlib import AbstractContextManager

from . import layers
from .chooser import DIRECTIONS, Call, Choice, Direction, forced

__all__ = ["BACKENDS", "DIRECTIONS", "Call", "Choice", "Direction", "backend"]

BACKENDS = layers.CHOOSER.names
"""``"sparse"``: the CUDA kernels; ``"blocks"``: the Triton kernels; ``"dense"``: torch's, with a masked weight."""


def backend(name: str) -> AbstractContextManager[None]:
    """A context in which one backend computes every masked layer on a CUDA device, backward passes included.

    Nothing is measured in it. It holds for all threads of the process.

    Args:
        name: one of :data:`BACKENDS`.

    Raises:
        ValueError: an unknown name. Inside, a layer that the backend cannot compute raises what says why:
            :class:`fedpai_kernels.cuda.CudaUnavailableError` without the CUDA kernels, RuntimeError without Triton,
            ValueError for a mask that is not made of blocks, TypeError for another dtype.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return forced(name)
