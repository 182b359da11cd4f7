# SPDX-License-Identifier: Apache-2.0
"""The server's optimisers: from the old global model and the clients' mean to the next global model.

    avgm   FedAvgM (Hsu, Qi and Brown, arXiv 1909.06335), with the server's learning rate of Reddi et al.
    adam   FedAdam (Reddi et al., arXiv 2003.00295, Algorithm 2)
    yogi   FedYogi (the same)

The formulas are those of `fedpai_kernels.aggregate.server_step`. Only parameters take the step. Running statistics are
no parameters and have no gradient: they take the clients' mean as it is. State is kept for every element of the packed
model, in the server's `extra`; a weight that leaves the mask loses its state, one that comes in starts anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedpai.federation.layout import Floats, MaskSet, pack, unpack
from fedpai_kernels import aggregate

if TYPE_CHECKING:
    from fedpai.federation.server import Server

BETA2 = 0.99
"""Decay of the second moment; the value of Reddi et al."""
TAU = 1e-3
"""Adaptivity, which keeps weights of small updates from large steps; the value that Reddi et al. start from."""

M, V = "server_opt.m", "server_opt.v"
STARTS = {M: 0.0, V: TAU**2}
"""The state by its names in `extra`, and its values at the start: Algorithm 2 asks for v of at least tau^2."""


def step(server: Server, merged: Floats) -> Floats:
    """The next global model, packed as the server's; with `--server-opt none` the clients' mean itself.

    Args:
        server: its `floats` are the old model; its `extra` holds the optimiser's state, which is changed.
        merged: float32, the clients' mean, packed under the server's mask.
    """
    config = server.config
    if config.server_opt == "none":
        return merged
    parameters = merged.size - server.layout.statistics_count
    m = _state(server, M)[:parameters]
    v = None if config.server_opt == "avgm" else _state(server, V)[:parameters]
    stepped = aggregate.server_step(
        config.server_opt,
        server.floats[:parameters],
        merged[:parameters],
        m,
        v,
        lr=config.server_lr,
        beta1=config.server_momentum,
        beta2=BETA2,
        tau=TAU,
    )
    return np.concatenate((stepped, merged[parameters:]))


def move_state(server: Server, mask: MaskSet) -> None:
    """Packs the state under the mask that the server is about to have."""
    for name, start in STARTS.items():
        if name in server.extra:
            dense = unpack(server.extra[name], server.mask, server.layout, start)
            server.extra[name] = pack(dense, mask, server.layout)


def _state(server: Server, name: str) -> Floats:
    if name not in server.extra:
        server.extra[name] = np.full(server.floats.size, STARTS[name], np.float32)
    return server.extra[name]
