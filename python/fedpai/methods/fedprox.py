# SPDX-License-Identifier: Apache-2.0
"""FedProx (Li et al., "Federated optimization in heterogeneous networks", arXiv 1812.06127).

A client minimises its loss plus mu / 2 ||w - w_t||^2, with w_t the global model that it was sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpai.federation.bound import BoundModel
from fedpai.federation.client import Client
from fedpai.methods.base import MERGES, Method


class FedProx(Method):
    """Federated averaging of clients that are held near the global model."""

    name = "fedprox"
    summary = "dense federated averaging, each client held near the global model by --prox-mu"
    uses = MERGES | {"prox_mu"}

    def train(self, client: Client) -> None:
        """Local SGD; mu (w - w_t) is added to the gradients of all trainable parameters."""
        sent: list[Tensor] = []

        @torch.no_grad()
        def pull(bound: BoundModel) -> None:
            parameters = [p for p in bound.model.parameters() if p.grad is not None]
            if not sent:  # called before the first step
                sent.extend(p.clone() for p in parameters)
            for p, start in zip(parameters, sent, strict=True):
                assert p.grad is not None
                p.grad.add_(p - start, alpha=self.config.prox_mu)

        client.fit(adjust=pull)
