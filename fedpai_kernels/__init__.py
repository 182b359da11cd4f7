# SPDX-License-Identifier: Apache-2.0
"""Kernels that touch only the weights a fixed mask keeps, and the torch modules built on them.

    import fedpai_kernels as fk

    report = fk.sparsify_(model, masks)      # masks: {module name: bool tensor}; in place
    print(report)                            # per layer: density, kernel, and why
    ...                                      # train, save and share `model` as before
    fk.densify_(model)                       # back to plain torch modules

A mask is compiled once into a :class:`Plan`; values live apart from it, packed, one number per surviving
weight.
"""

# torch first: the compiled module then binds to torch's OpenMP runtime, so that both share one pool of
# threads.
import torch as _torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"fedpai_kernels: the compiled module cannot be loaded with torch {_torch.__version__} ({error}). "
        "Build it with `pip install .` in the repository, and do not import from a source tree that is not "
        "built."
    ) from error

from . import aggregate, cuda, dispatch, nn, ops, optim
from ._C import available_isas, compiled_isas, isa, set_isa
from .graphed import graphed_step
from .layout import empty_batch_last, is_batch_last, to_batch_last, to_contiguous
from .memory import MemoryStats, empty_cache, memory_stats
from .nn.convert import densify_, report, sparsify, sparsify_
from .nn.report import Report
from .plan import Plan
from .tuning.measure import tune

__version__ = _C.__version__

__all__ = [
    "MemoryStats",
    "Plan",
    "Report",
    "__version__",
    "aggregate",
    "available_isas",
    "compiled_isas",
    "cuda",
    "densify_",
    "dispatch",
    "empty_batch_last",
    "empty_cache",
    "graphed_step",
    "is_batch_last",
    "isa",
    "memory_stats",
    "nn",
    "ops",
    "optim",
    "report",
    "set_isa",
    "sparsify",
    "sparsify_",
    "to_batch_last",
    "to_contiguous",
    "tune",
]
