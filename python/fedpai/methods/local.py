# SPDX-License-Identifier: Apache-2.0
"""Local training without a federation: what any federated method has to beat.

In round 0 every client gets the initial model and says how many images it has. Nothing travels after that.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedpai.federation.client import Client, ClientError
from fedpai.federation.payload import NO_MASK, Kind, PayloadError, decode, encode
from fedpai.federation.server import Server, Update
from fedpai.methods.base import Method, MethodError, only


class Local(Method):
    """Every client trains a model of its own. The server keeps the initial model and n_k."""

    name = "local"
    summary = "every client trains its own model from the same initial weights; nothing is shared"
    has_global: ClassVar[bool] = False

    @property
    def personal(self) -> bool:
        """Always: there is no other model."""
        return True

    @property
    def asks_clients(self) -> bool:
        """Round 0 hands out the initial model."""
        return True

    def propose(self, client: Client) -> list[bytes]:
        """Keeps the initial model; answers with a message that is only a header."""
        self._keep(client)
        digest = client.layout.digest
        header = encode(
            Kind.VALUES,
            round=client.round,
            client=client.id,
            examples=client.examples,
            model_digest=digest,
            mask_digest=NO_MASK,
        )
        return [header]

    def accept_proposal(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """A header: the client is there, with so many examples."""
        header = decode(only(messages), most=0).expect(
            kind=Kind.VALUES,
            round=server.round,
            client=client,
            model_digest=server.layout.digest,
            mask_digest=NO_MASK,
            count=0,
        )
        return Update(client, header.examples)

    def agree(self, server: Server, updates: list[Update]) -> None:
        """Remembers n_k, by which personalised accuracies are averaged; 0 for clients that are not there."""
        if not updates:
            raise MethodError("no client took the initial model, so there is nothing to train")
        server.extra["examples"] = np.zeros(server.config.clients, np.int64)
        for update in updates:
            server.extra["examples"][update.client] = update.examples

    def send(self, server: Server, client: int) -> list[bytes]:
        """The initial model in round 0, nothing later."""
        return super().send(server, client) if server.round == 0 else []

    def train(self, client: Client) -> None:
        """Goes on training the client's own model."""
        own = client.memory.extra
        if "floats" not in own:
            raise ClientError(f"client {client.id} has no model: it was not there in round 0")
        client.floats, client.ints = own["floats"], own["ints"]
        super().train(client)
        if not np.isfinite(client.model_vectors()[0]).all():
            raise ClientError("its training diverged; it keeps the model of its last turn")
        self._keep(client)

    def _keep(self, client: Client) -> None:
        client.memory.extra["floats"], client.memory.extra["ints"] = client.model_vectors()

    def answer(self, client: Client) -> list[bytes]:
        """Nothing."""
        return []

    def accept(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Nothing is expected."""
        examples = int(server.extra["examples"][client])
        if messages or examples == 0:
            what = f"expected no message, got {len(messages)}" if messages else "was not there in round 0"
            raise PayloadError(f"client {client}: {what}")
        return Update(client, examples)

    def merge(self, server: Server, updates: list[Update]) -> None:
        """Nothing: there is no global model."""
