# SPDX-License-Identifier: Apache-2.0
"""Who computes a layer: this project's kernels and the rivals, one file each, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedpai.bench.rivals import dense, ours, sparseprop, torch_sparse
from fedpai.bench.rivals.base import Contender, Problem, Unavailable

# Each gives the contender in its variants, of which the best counts, or raises Unavailable with the reason.
CONTENDERS: dict[str, Callable[[Problem], list[Contender]]] = {
    "ours": ours.build,
    "dense": dense.build,
    "sparseprop": sparseprop.build,
    "torch.sparse": torch_sparse.build,
    "sparseprop-contiguous": partial(sparseprop.build, contiguous=True),
}
RIVALS = tuple(name for name in CONTENDERS if name != "ours")
DEFAULT_RIVALS = ("dense", "sparseprop", "torch.sparse")

__all__ = ["CONTENDERS", "DEFAULT_RIVALS", "RIVALS", "Contender", "Problem", "Unavailable"]
