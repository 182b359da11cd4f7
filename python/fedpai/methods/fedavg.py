# SPDX-License-Identifier: Apache-2.0
"""Federated averaging (McMahan et al., arXiv 1602.05629): dense, the baseline of everything here."""

from __future__ import annotations

from fedpai.methods.base import MERGES, Method


class FedAvg(Method):
    """Every client trains and sends the whole model; the server takes the example-weighted mean."""

    name = "fedavg"
    summary = "dense federated averaging, the baseline"
    uses = MERGES
