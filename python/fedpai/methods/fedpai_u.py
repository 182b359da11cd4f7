# SPDX-License-Identifier: Apache-2.0
"""FedPaI-U: unstructured pruning at initialisation, scored on the clients' own images (arXiv 2504.00308).

The paper names the idea (a pattern fixed before training, GraSP on the clients, sparsity-aware aggregation);
the form below is this project's choice where its text is silent. Every client scores the same initial model
on up to `PER_CLASS` images of each class it has. Then either

    shared     the server averages the scores by n_k and everybody gets the one mask of the best weights, or
    personal   each client keeps its own best weights and tells the server which; merging averages each
               weight over the clients that keep it.
"""

from __future__ import annotations

from fedpai import pruning
from fedpai.federation.aggregate import weighted_mean
from fedpai.federation.client import Client, ClientError
from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import PayloadError
from fedpai.federation.server import Server, Update
from fedpai.methods.base import MERGES, Method, MethodError, only
from fedpai.methods.fixed import chooser, prune_at_server, refusal
from fedpai.pruning.criteria import Batch

PER_CLASS = 10
SCORED_ON_DATA = frozenset({"grasp", "snip"})
"""Criteria that look at images. All others give everybody the same mask, so nobody needs to be asked."""


class FedPaiU(Method):
    """Fixed sparse training under a shared mask or under personal masks."""

    name = "fedpai-u"
    summary = "weights chosen by --criterion on the clients before training, --mask-mode shared or personal"
    uses = MERGES | {"sparsity", "criterion", "allocation", "mask_mode", "structure", "budget", "scores"}

    @property
    def personal(self) -> bool:
        """True with personal masks."""
        return self.config.mask_mode == "personal"

    @property
    def asks_clients(self) -> bool:
        """A shared mask by a criterion without data is the server's affair alone."""
        return self.personal or self.config.criterion in SCORED_ON_DATA

    def choose_masks(self, server: Server) -> None:
        """Chooses the mask at once where no client needs to be asked; otherwise refuses what cannot be."""
        if self.asks_clients:
            chooser(self.config, server.model())
        else:
            server.set_mask(prune_at_server(server, self.config, self.config.criterion))

    def scoring_images(self, client: Client) -> Batch:
        """What a client scores on: up to `PER_CLASS` images of each class that it has."""
        seed = client.seed("scoring images")
        return pruning.balanced_batch(client.data, client.indices, PER_CLASS, seed=seed)

    def propose(self, client: Client) -> list[bytes]:
        """Scores the initial model on the client's images; answers with the scores, or with its own mask."""
        config = self.config
        data = self.scoring_images(client)
        seed = client.seed("mask")
        try:
            if not self.personal:
                scores = pruning.scores(client.model(), config.criterion, data=data, seed=seed)
                return [client.scores_message(client.layout.from_layers(scores))]
            masks = pruning.prune(
                client.model(),
                config.sparsity,
                config.criterion,
                allocation=config.allocation,
                data=data,
                seed=seed,
                structure=config.structure,
                budget=config.budget,
            )
        except ValueError as error:
            raise ClientError(f"scoring failed: {error}") from None
        mask = MaskSet.from_masks(client.layout, masks)
        client.set_mask(mask)
        return [client.mask_message(mask)]

    def accept_proposal(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Scores, or a mask of the agreed size and structure."""
        if not self.personal:
            return server.read_scores(client, only(messages))
        update = server.read_mask(client, only(messages))
        if update.mask is None:
            raise PayloadError(f"client {client} sent no mask")
        choice = chooser(self.config, server.model())
        try:
            choice.check(update.mask.masks())
        except ValueError as error:
            raise PayloadError(f"payload {error}") from None
        return update

    def agree(self, server: Server, updates: list[Update]) -> None:
        """One mask from the averaged scores, or everybody's own."""
        masks = {update.client: update.mask for update in updates if update.mask is not None}
        scored = [update for update in updates if update.scores is not None]
        if not masks and not scored:
            raise MethodError("no client proposed a mask, so there is nothing to train")
        if self.personal:
            server.set_client_masks(masks, informed=masks)
            return
        mean = weighted_mean(
            [update.scores for update in scored if update.scores is not None],
            [update.examples for update in scored],
        )
        choice = chooser(self.config, server.model())
        try:
            chosen = choice.masks(server.layout.by_layer(mean))
        except ValueError as error:
            raise refusal(self.config, error) from None
        server.set_mask(MaskSet.from_masks(server.layout, chosen))
