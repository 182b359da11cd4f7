# SPDX-License-Identifier: Apache-2.0
"""FedDST, federated dynamic sparse training (Bibikar, Vikalo, Wang, Chen, AAAI 2022, arXiv 2112.09824).

One mask for everybody, random under ERK at first. In some rounds every client of the round changes it: in each
layer it prunes its smallest weights, grows as many where its gradient is largest, trains, and sends its mask
with its values. The server averages each weight over those who keep it and prunes back to the first densities.
docs/methods/feddst.md says what is the paper's, what its code's and what is ours.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from fedpai.federation.client import Client
from fedpai.federation.config import RunConfig
from fedpai.federation.payload import PayloadError
from fedpai.federation.server import Server, Update
from fedpai.methods.adjust import adjusted, counts, largest_weights
from fedpai.methods.base import MERGES, Method
from fedpai.methods.fixed import prune_at_server


class FedDST(Method):
    """Sparse training under a mask that clients and server go on adjusting."""

    name = "feddst"
    summary = "one mask that clients adjust every --adjust-every rounds: smallest weights out, largest gradients in"
    uses = MERGES | {"sparsity", "adjust_every", "adjust_rate"}

    def __init__(self, config: RunConfig) -> None:
        super().__init__(replace(config, structure="weight", budget="weights", criterion="erk", allocation=None))

    def choose_masks(self, server: Server) -> None:
        """Random weights at the densities of ERK."""
        server.set_mask(prune_at_server(server, self.config, "erk"))

    def train(self, client: Client) -> None:
        """Local training, under a mask of its own in rounds of adjustment."""
        if moved := rate(self.config, client.round):
            start = time.perf_counter()
            client.remask(adjusted(client, moved))
            client.bound()  # compiled here, so that what it takes is counted
            client.log.seconds += time.perf_counter() - start
        client.fit()

    def answer(self, client: Client) -> list[bytes]:
        """The values, in rounds of adjustment after the mask that they are packed under."""
        if client.memory.mask is None or not rate(self.config, client.round):
            return super().answer(client)
        return [client.mask_message(client.memory.mask), client.values_message()]

    def accept(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """In rounds of adjustment a mask that keeps as many weights of each layer as the server's, and its values."""
        if not rate(self.config, server.round):
            return super().accept(server, client, messages)
        if len(messages) != 2:
            raise PayloadError(f"expected a mask and a model, got {len(messages)} messages")
        mask = server.read_mask(client, messages[0]).mask
        if mask is None or server.mask is None:
            raise PayloadError(f"client {client} sent no mask")
        if (sent := counts(mask)) != (agreed := counts(server.mask)):
            name = next(name for name in agreed if sent[name] != agreed[name])
            raise PayloadError(f"payload mask keeps {sent[name]} weights of {name}, expected {agreed[name]}")
        update = server.read_values(client, messages[1], mask)
        update.mask = mask
        return update

    def merge(self, server: Server, updates: list[Update]) -> None:
        """The masked mean over the union of the clients' masks, then the largest weights of each layer."""
        masks = {update.client: update.mask for update in updates if update.mask is not None}
        if not masks or server.mask is None:
            super().merge(server, updates)
            return
        agreed = counts(server.mask)
        server.set_client_masks(masks)
        super().merge(server, updates)
        server.set_mask(largest_weights(server, agreed))


def rate(config: RunConfig, round: int) -> float:
    """Share of the weights of each layer that a round moves: 0 in most rounds.

    Every `adjust_every` rounds from the second on, `adjust_rate` / 2 (1 + cos(pi t / T)), where t is counted from
    the second round and T is half of the run; nothing from t = T on.
    """
    passed, end = round - 2, config.rounds // 2
    if not 0 <= passed < end or passed % config.adjust_every:
        return 0.0
    return config.adjust_rate / 2 * (1 + math.cos(math.pi * passed / end))
