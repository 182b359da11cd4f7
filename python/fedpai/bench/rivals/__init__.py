# SPDX-License-Identifier: Apache-2.0
"""Who computes a layer: this project's kernels and the rivals, one file each, by name."""

from __future__ import annotations

from collections.abc import Callable

from fedpai.bench.rivals.base import Contender, Problem, Unavailable
from fedpai.bench.rivals.dense import dense
from fedpai.bench.rivals.ours import ours
from fedpai.bench.rivals.sparseprop import sparseprop
from fedpai.bench.rivals.torch_sparse import torch_sparse

# Each gives the contender in its variants, of which the best counts, or raises Unavailable with the reason.
CONTENDERS: dict[str, Callable[[Problem], list[Contender]]] = {
    "ours": ours,
    "dense": dense,
    "sparseprop": sparseprop,
    "torch.sparse": torch_sparse,
}
RIVALS = tuple(name for name in CONTENDERS if name != "ours")

__all__ = ["CONTENDERS", "RIVALS", "Contender", "Problem", "Unavailable"]
