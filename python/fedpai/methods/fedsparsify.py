# SPDX-License-Identifier: Apache-2.0
"""FedSparsify (Stripelis, Gupta, Ver Steeg, Ambite; arXiv 2204.12430): what its two forms have in common.

Training starts dense. After each round from the second on, the smallest weights go until the share s_t is gone:

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (T - t0))^n,    s_i = 0, t0 = 1, n = 3, t = f floor(round / f)

with s_f the run's sparsity, T its rounds and f its `prune_every`. What has gone never comes back.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedpai import pruning
from fedpai.federation.client import Client
from fedpai.federation.config import ConfigError, RunConfig
from fedpai.federation.layout import Floats, Layout, MaskSet, unpack
from fedpai.federation.server import Server
from fedpai.methods.base import MERGES, Method

START = 1
EXPONENT = 3


def sparsity_after(round: int, rounds: int, final: float, every: int = 1) -> float:
    """s_t: the share of weights gone after a round, 0 up to `START`; `final` after the last if `every` divides it."""
    t = every * (round // every)
    if t <= START:
        return 0.0
    return final * (1.0 - (1.0 - (t - START) / (rounds - START)) ** EXPONENT)


class FedSparsify(Method):
    """Base of both forms: local training under the global mask, and pruning by magnitude on the schedule."""

    uses = MERGES | {"sparsity", "prune_every"}
    carry_momentum: ClassVar[bool] = True
    """Whether a client's momentum outlives its turn; that of dropped weights goes with them."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        first = max(START + 1, config.prune_every)
        if config.sparsity > 0 and first > config.rounds:
            raise ConfigError(f"--rounds {config.rounds}: {self.name} would first prune after round {first}")

    def train(self, client: Client) -> None:
        """Local SGD under the global mask."""
        client.fit(carry_momentum=self.carry_momentum)

    def tighten(self, server: Server, mask: MaskSet) -> None:
        """Gives everybody a mask inside the one before, whose model nobody needs again."""
        if server.mask is not None:  # the dense model may be a baseline's too
            server.pool.drop(server.mask)
        server.set_mask(mask)

    def sparsity_after(self, round: int) -> float:
        """s_t of this run."""
        config = self.config
        return sparsity_after(round, config.rounds, config.sparsity, config.prune_every)

    def kept_after(self, round: int, mask: MaskSet | None, layout: Layout) -> int:
        """How many weights the schedule leaves after a round of a model that has those of `mask` (None: all)."""
        left = layout.weight_count if mask is None else mask.kept
        return min(left, pruning.kept_count(layout.weight_count, self.sparsity_after(round)))

    def tightened(self, round: int, floats: Floats, mask: MaskSet | None, layout: Layout) -> MaskSet | None:
        """The largest weights of a packed model, all layers ranked together; `mask` itself where it is small enough.

        Every layer keeps its largest weight. Of equal ones the first in the layout's order stays.

        Raises:
            ValueError: weights that are not finite.
        """
        if self.kept_after(round, mask, layout) == (layout.weight_count if mask is None else mask.kept):
            return mask
        magnitudes = layout.by_layer(np.abs(unpack(floats, mask, layout)[: layout.weight_count]))
        within = None if mask is None else mask.masks()
        masks = pruning.masks_from_scores(magnitudes, self.sparsity_after(round), within=within)
        return MaskSet.from_masks(layout, masks)
