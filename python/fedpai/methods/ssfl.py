# SPDX-License-Identifier: Apache-2.0
"""SSFL (Ohib et al., arXiv 2405.09037): one mask for everybody from the clients' averaged saliency.

    s = sum_k n_k s_k / sum_k n_k        s_k = |g w| on one minibatch of client k, at the initial weights

The weights with the highest s over all layers are kept; the mask is broadcast once and never changes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedpai.federation.client import Client
from fedpai.federation.config import RunConfig
from fedpai.methods.base import MERGES
from fedpai.methods.fedpai_u import FedPaiU
from fedpai.pruning.criteria import Batch


class SSFL(FedPaiU):
    """FedPaI-U's shared form with SNIP on a plain minibatch."""

    name = "ssfl"
    summary = "one mask of the weights with the highest saliency, averaged over the clients before training"
    uses = MERGES | {"sparsity", "scores"}

    def __init__(self, config: RunConfig) -> None:
        super().__init__(
            replace(
                config,
                criterion="snip",
                allocation=None,
                mask_mode="shared",
                structure="weight",
                budget="weights",
            )
        )

    def scoring_images(self, client: Client) -> Batch:
        """As many of the client's images as a training step takes, whatever their classes."""
        draw = np.random.default_rng(client.seed("scoring images"))
        count = min(self.config.batch, client.examples)
        return client.data.batch(draw.choice(client.indices, count, replace=False))
