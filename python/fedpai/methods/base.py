# SPDX-License-Identifier: Apache-2.0
"""The interface that a federated method fills in.

A run is one turn of choosing masks (round 0) and then rounds of training. In every turn the server sends
messages to clients, each client answers with messages, and the server merges what it accepts. Messages
are bytes and the two sides share nothing else, so a method runs the same in one process or in many.

The defaults below are dense federated averaging. A method overrides what it does differently:

    hook              side     question it answers
    choose_masks      server   which masks can be chosen before hearing from anybody?
    asks_clients      server   must clients speak before the first round (round 0)?
    propose           client   what does a client say in round 0?
    accept_proposal   server   is that message fit to be used?
    agree             server   which masks follow from the proposals?
    send              server   what does a client get at the start of its turn?
    train             client   what does it train?
    answer            client   what does it send back?
    accept            server   is that message fit to be used?
    merge             server   how do the answers become the next global model (and the next masks)?
    recall            client   which model does it hold between its turns? (methods without a global model)
"""

from __future__ import annotations

from typing import ClassVar

from fedpai.federation import server_opt
from fedpai.federation.aggregate import largest, masked_mean, weighted_mean
from fedpai.federation.client import TAKES, Client
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import Floats, Ints
from fedpai.federation.payload import Kind, PayloadError
from fedpai.federation.server import Server, Update

MERGES = frozenset({"server_opt", "server_lr", "server_momentum"})
"""Settings of the default `merge`, for the `uses` of methods that keep it."""


class MethodError(RuntimeError):
    """A run that cannot go on: too little came back from the clients."""


class Method:
    """Dense federated averaging, and the base of every other method.

    Attributes:
        name: what `--method` takes.
        summary: one line for the help text.
        uses: settings of the run that mean something to this method, beside the common ones.
        has_global: whether the server holds a model; false where models stay on the clients.
        takes: the kinds of messages that `send` may give, one after the other; a client refuses any others.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset()
    has_global: ClassVar[bool] = True
    takes: ClassVar[tuple[tuple[Kind, ...], ...]] = TAKES

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def personal(self) -> bool:
        """Whether clients end a round with a model of their own that deserves its own accuracy column."""
        return False

    # -- round 0: masks ----------------------------------------------------------------------------------

    def choose_masks(self, server: Server) -> None:
        """Server, before anything is sent. Default: no mask, a dense model."""

    @property
    def asks_clients(self) -> bool:
        """Whether every client is asked in round 0."""
        return False

    def propose(self, client: Client) -> list[bytes]:
        """Client, round 0, after receiving the initial model."""
        return []

    def accept_proposal(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Server, round 0. Raises PayloadError to refuse; nothing may have been changed by then."""
        raise PayloadError(f"method {self.name} expects no message before training")

    def agree(self, server: Server, updates: list[Update]) -> None:
        """Server, end of round 0, with the accepted proposals in client order."""

    # -- every round -------------------------------------------------------------------------------------

    def send(self, server: Server, client: int) -> list[bytes]:
        """Server: the mask where the client does not hold it yet, then the model."""
        return [*server.mask_message(client), server.values_message(client)]

    def train(self, client: Client) -> None:
        """Client: local epochs of SGD on cross-entropy."""
        client.fit()

    def answer(self, client: Client) -> list[bytes]:
        """Client: its model after training."""
        return [client.values_message()]

    def accept(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Server. Raises PayloadError to refuse; nothing may have been changed by then."""
        return server.read_values(client, only(messages))

    def merge(self, server: Server, updates: list[Update]) -> None:
        """Server: a step towards the example-weighted mean; under personal masks, over those that keep the weight."""
        examples = [update.examples for update in updates]
        floats = [floats_of(update) for update in updates]
        if server.client_masks:
            at = [server.places_of(update.client) for update in updates]
            merged = masked_mean(server.floats, floats, at, examples)
        else:
            merged = weighted_mean(floats, examples)
        server.floats = server_opt.step(server, merged)
        server.ints = largest([ints_of(update) for update in updates])

    # -- after the last round ------------------------------------------------------------------------------

    def recall(self, client: Client) -> None:
        """Client, where models stay there: makes the one that it holds between its turns its current one.

        Default: the vectors `floats` and `ints` of its memory, if it has any.
        """
        client.floats, client.ints = (client.memory.extra.get(name) for name in ("floats", "ints"))


def only(messages: list[bytes]) -> bytes:
    """The single message of a turn.

    Raises:
        PayloadError: none or several.
    """
    if len(messages) != 1:
        raise PayloadError(f"expected one message, got {len(messages)}")
    return messages[0]


def floats_of(update: Update) -> Floats:
    """The model values of an update that must have them."""
    if update.floats is None:
        raise PayloadError(f"client {update.client} sent no model")
    return update.floats


def ints_of(update: Update) -> Ints:
    """The integer buffers of an update that must have them."""
    if update.ints is None:
        raise PayloadError(f"client {update.client} sent no integer buffers")
    return update.ints
