# SPDX-License-Identifier: Apache-2.0
"""FedPaI-S: pruning at initialisation by whole channels, so that layers become physically smaller.

The paper (arXiv 2504.00308) prunes channels at the server before training; which algorithm it uses for that is not
known to us, so this is *a* structured pruning at initialisation and the choice is ours (docs/methods/fedpai.md).

    shared     the server scores the initial model with SynFlow, which needs no data, and everybody gets its mask
    personal   each client scores with GraSP on its own images and keeps its own channels
"""

from __future__ import annotations

from dataclasses import replace

from fedpai.federation.config import RunConfig
from fedpai.methods.base import MERGES
from fedpai.methods.fedpai_u import FedPaiU


class FedPaiS(FedPaiU):
    """FedPaI-U with channels in place of single weights."""

    name = "fedpai-s"
    summary = "channels removed before training, one choice of the server or --mask-mode personal"
    uses = MERGES | {"sparsity", "mask_mode", "budget"}

    def __init__(self, config: RunConfig) -> None:
        criterion = "grasp" if config.mask_mode == "personal" else "synflow"
        super().__init__(replace(config, structure="channel", criterion=criterion, allocation=None))
