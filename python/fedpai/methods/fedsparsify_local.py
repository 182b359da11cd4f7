# SPDX-License-Identifier: Apache-2.0
"""FedSparsify-Local (arXiv 2204.12430): every client prunes its own model, and the server takes a vote.

    weight j stays if at least max(1, floor(K / 2)) of the round's K clients keep it; its value is then
    all       sum_k n_k m_kj w_kj / sum_k n_k          (what a client has pruned counts as 0)
    voters    sum_k n_k m_kj w_kj / sum_k n_k m_kj
"""

from __future__ import annotations

import numpy as np

from fedpai.federation import server_opt
from fedpai.federation.aggregate import largest, majority, masked_mean, weighted_mean
from fedpai.federation.client import Client, ClientError
from fedpai.federation.layout import LayoutError, MaskSet, places, repack
from fedpai.federation.payload import PayloadError
from fedpai.federation.server import Server, Update
from fedpai.methods.base import floats_of, ints_of, only
from fedpai.methods.fedsparsify import FedSparsify


class FedSparsifyLocal(FedSparsify):
    """One mask, tightened by majority vote of the clients' own."""

    name = "fedsparsify-local"
    summary = "starts dense; clients drop their smallest weights round by round, a majority decides what stays"
    uses = FedSparsify.uses | {"merge_rule"}

    def answer(self, client: Client) -> list[bytes]:
        """The pruned model, after its mask where something was pruned. The client goes on under the global mask."""
        floats, _ = client.model_vectors()
        try:
            mask = self.tightened(client.round, floats, client.memory.mask, client.layout)
        except ValueError as error:
            raise ClientError(f"pruning failed: {error}") from None
        if mask is None or mask == client.memory.mask:
            return [client.values_message()]
        return [client.mask_message(mask), client.values_message(mask)]

    def accept(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """A model under the global mask, or where the schedule asks for pruning a mask inside it and its values."""
        wanted = self.kept_after(server.round, server.mask, server.layout)
        if wanted == (server.layout.weight_count if server.mask is None else server.mask.kept):
            return server.read_values(client, only(messages))
        if len(messages) != 2:
            raise PayloadError(f"expected a mask and the values under it, got {len(messages)} messages")
        mask = server.read_mask(client, messages[0]).mask
        assert mask is not None
        if mask.kept != wanted:
            raise PayloadError(f"payload mask keeps {mask.kept} weights, the schedule {wanted} after this round")
        if server.mask is not None:
            try:
                places(mask, server.mask)
            except LayoutError:
                raise PayloadError("payload mask brings back weights that were dropped before") from None
        update = server.read_values(client, messages[1], mask)
        update.mask = mask
        return update

    def merge(self, server: Server, updates: list[Update]) -> None:
        """The majority's weights, averaged by the merge rule; everything else by the example-weighted mean."""
        masks = [update.mask for update in updates if update.mask is not None]
        if len(masks) < len(updates):  # the schedule asks all of a round's clients to prune, or none
            super().merge(server, updates)
            return
        held = everything(server)
        examples = [update.examples for update in updates]
        floats = [floats_of(update) for update in updates]
        if self.config.merge_rule == "voters":
            others = np.arange(held.kept, server.floats.size, dtype=np.int32)
            at = [np.concatenate((places(mask, held), others)) for mask in masks]
            merged = masked_mean(server.floats, floats, at, examples)
        else:
            zeroed = [repack(own, mask, held, server.layout) for own, mask in zip(floats, masks, strict=True)]
            merged = weighted_mean(zeroed, examples)
        server.floats = server_opt.step(server, merged)
        server.ints = largest([ints_of(update) for update in updates])
        mask = elected(masks)
        if mask != server.mask:
            self.tighten(server, mask)


def elected(masks: list[MaskSet]) -> MaskSet:
    """The weights that at least max(1, floor(K / 2)) of K masks keep; of a layer without any, the most voted."""
    voted = majority(masks, max(1, len(masks) // 2))
    lost = [slot for slot, layer in voted.parts() if layer.start == layer.stop]
    if not lost:
        return voted
    positions = [voted.positions]
    for slot in lost:
        inside = [mask.positions[(mask.positions >= slot.offset) & (mask.positions < slot.stop)] for mask in masks]
        votes = np.bincount(np.concatenate(inside) - slot.offset)
        positions.append(np.array([slot.offset + np.argmax(votes)]))
    return MaskSet.from_positions(voted.layout, np.sort(np.concatenate(positions)))


def everything(server: Server) -> MaskSet:
    """The mask of the global model; of a dense one, all weights."""
    return MaskSet.from_masks(server.layout, {}) if server.mask is None else server.mask
