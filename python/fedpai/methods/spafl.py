# SPDX-License-Identifier: Apache-2.0
"""SpaFL (Kim, Saad, Debbah, Hong, NeurIPS 2024, arXiv 2406.00431): only thresholds travel.

Every filter and neuron has a trainable threshold that switches it off (`fedpai.methods.thresholds`). Weights
never leave their client; the server averages thresholds, and each client moves its weights as those moved.
docs/methods/spafl.md says what is the paper's and what is ours.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor, nn

from fedpai.federation.aggregate import weighted_mean
from fedpai.federation.client import Client, ClientError
from fedpai.federation.layout import Floats, Ints
from fedpai.federation.payload import Kind, PayloadError
from fedpai.federation.server import Server, Update
from fedpai.methods import thresholds
from fedpai.methods.base import Method, only


class SpaFL(Method):
    """Every client its own weights and mask; thresholds are the one thing that is shared."""

    name = "spafl"
    summary = "trainable thresholds of filters and neurons, which alone travel; every client its own model"
    uses = frozenset({"threshold_penalty"})
    has_global = False
    takes = ((Kind.THRESHOLDS,),)
    personal = True

    def choose_masks(self, server: Server) -> None:
        """All thresholds at 0: everything is kept."""
        server.extra["thresholds"] = np.zeros(server.layout.channel_count, np.float32)

    def send(self, server: Server, client: int) -> list[bytes]:
        """The thresholds, nothing else."""
        return [server.thresholds_message(server.extra["thresholds"])]

    def train(self, client: Client) -> None:
        """Follows the thresholds' change since its last turn, then trains weights and thresholds together."""
        received = client.thresholds
        if received is None:
            raise PayloadError(f"client {client.id} was sent no thresholds in round {client.round}")
        floats, client.ints = held(client)
        earlier = client.memory.extra.get("received", np.zeros_like(received))
        client.floats = thresholds.follow(client.layout, floats, received - earlier)
        penalty = self.config.threshold_penalty * ramp(client.round)
        with thresholds.thresholded(client.bound().model, client.layout, received) as parameters:

            def loss(outputs: Tensor, labels: Tensor) -> Tensor:
                value = nn.functional.cross_entropy(outputs, labels)
                for parameter in parameters:
                    value = value + penalty * parameter.values.neg().exp().sum()
                return value

            client.fit(loss)
            trained = thresholds.read(parameters)
        floats, ints = client.model_vectors()
        if not (np.isfinite(floats).all() and np.isfinite(trained).all()):
            raise ClientError("its training diverged; it keeps the model of its last turn")
        client.memory.extra.update(floats=floats, ints=ints, received=received, trained=trained)
        self.recall(client)

    def answer(self, client: Client) -> list[bytes]:
        """The trained thresholds."""
        return [client.thresholds_message(client.memory.extra["trained"])]

    def accept(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Raises PayloadError for anything but this client's thresholds of this round."""
        return server.read_thresholds(client, only(messages))

    def merge(self, server: Server, updates: list[Update]) -> None:
        """The plain mean; clients do not count by their images."""
        sent = [update.thresholds for update in updates if update.thresholds is not None]
        server.extra["thresholds"] = weighted_mean(sent, [1] * len(sent))

    def recall(self, client: Client) -> None:
        """The client's weights under the thresholds that it trained last; before its first turn, all of them."""
        floats, client.ints = held(client)
        trained = client.memory.extra.get("trained", np.zeros(client.layout.channel_count, np.float32))
        client.floats = thresholds.masked(client.layout, floats, trained)


def held(client: Client) -> tuple[Floats, Ints]:
    """The client's own weights, dense; before its first turn those that the run's seed gives everybody."""
    extra = client.memory.extra
    return (extra["floats"], extra["ints"]) if "floats" in extra else client.pool.initial()


def ramp(round: int) -> float:
    """How far the penalty is switched on: 0.007 in the first round, 0.993 in the second, then 1."""
    return 1 / (1 + math.exp(5 - 10 * (round - 1)))
