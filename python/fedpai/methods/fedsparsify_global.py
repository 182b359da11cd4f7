# SPDX-License-Identifier: Apache-2.0
"""FedSparsify-Global (arXiv 2204.12430): the server prunes the merged model, and everybody follows."""

from __future__ import annotations

from fedpai.federation.server import Server, Update
from fedpai.methods.fedsparsify import FedSparsify


class FedSparsifyGlobal(FedSparsify):
    """One mask, tightened by the server after it has merged."""

    name = "fedsparsify-global"
    summary = "starts dense; the server drops the smallest weights round by round, up to --sparsity"

    def merge(self, server: Server, updates: list[Update]) -> None:
        """The example-weighted mean, pruned to the schedule."""
        super().merge(server, updates)
        mask = self.tightened(server.round, server.floats, server.mask, server.layout)
        if mask is not None and mask != server.mask:
            self.tighten(server, mask)
