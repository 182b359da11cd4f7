# SPDX-License-Identifier: Apache-2.0
"""Rounds of federated learning in dense float64 torch, written without the package's own training and merging."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedpai.federation.layout import MaskSet
from fedpai.federation.payload import Kind, encode
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import generator
from fedpai.federation.server import Server

State = dict[str, Tensor]

ROUNDING = 2e-6
"""How far float32 may be from float64 after these few steps; two weights closer than this may change places."""


def proposed(server: Server, mask: MaskSet) -> bytes:
    """The message in which client 2 would propose a mask in round 0."""
    return encode(
        Kind.MASK,
        round=0,
        client=2,
        examples=5,
        model_digest=server.layout.digest,
        mask_digest=mask.digest,
        bits=mask.bits(),
        count=server.layout.weight_count,
    )


@dataclass
class Restatement:
    """Dense local training and averaging; masks are multiplied in.

    Attributes:
        run: only its settings, images and partition are used.
        state: the global model, float64.
        velocity: each client's momentum by parameter, where it is carried from turn to turn.
    """

    run: Run
    state: State = field(default_factory=dict)
    velocity: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = create_model(self.run.config, self.run.data).double().state_dict()

    def trained(
        self, number: int, client: int, masks: State, *, carry: bool = False, mu: float = 0.0, own: State | None = None
    ) -> State:
        """A client's model after its turn of one epoch.

        v <- momentum v + (gradient + decay w + mu (w - w_t)) m,    w <- w - lr v
        """
        config, run = self.run.config, self.run
        model = create_model(config, run.data).double()
        model.load_state_dict(self.state if own is None else own)
        model.train()
        parameters = dict(model.named_parameters())
        start = {key: p.detach().clone() for key, p in parameters.items()}
        velocity = self.velocity.setdefault(client, {}) if carry else {}
        ones = torch.ones((), dtype=torch.bool)
        for key, p in parameters.items():
            velocity[key] = velocity.get(key, torch.zeros_like(p)) * masks.get(key, ones)
        order = generator(config.seed, "batches", number, client, 0).permutation(run.partition[client])
        for batch in np.split(order, range(config.batch, order.size, config.batch)):
            x, y = run.data.batch(batch)
            model.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            with torch.no_grad():
                for key, p in parameters.items():
                    assert p.grad is not None
                    gradient = p.grad + config.weight_decay * p + mu * (p - start[key])
                    velocity[key] = config.momentum * velocity[key] + gradient * masks.get(key, ones)
                    p -= config.lr * velocity[key]
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def mean(self, answers: dict[int, State]) -> State:
        """sum_k n_k w_k / sum_k n_k; of integers the largest."""
        n = {client: self.run.partition[client].size for client in answers}
        new = {}
        for key, old in self.state.items():
            parts = {client: answer[key] for client, answer in answers.items()}
            if old.is_floating_point():
                new[key] = sum(n[client] * part for client, part in parts.items()) / sum(n.values())
            else:
                new[key] = torch.stack(list(parts.values())).amax(0)
        return new

    def assert_equal(self, actual: State, expected: State | None = None) -> None:
        """Equal within the rounding of float32."""
        for key, tensor in (self.state if expected is None else expected).items():
            torch.testing.assert_close(actual[key].to(tensor.dtype), tensor, rtol=1e-3, atol=ROUNDING, msg=key)


def keys_of(mask: MaskSet | None) -> State:
    """A mask by the names of the parameters; of None nothing, which means all ones."""
    return {} if mask is None else {f"{name}.weight": flags for name, flags in mask.masks().items()}


def assert_largest(mask: State, state: State, before: State, kept: int) -> None:
    """`mask` keeps so many of the weights of `before`: each layer's largest, then the largest of all others.

    Where a weight is within rounding of the smallest that stay, either choice is right.
    """
    assert sum(int(flags.sum()) for flags in mask.values()) == kept
    inside, outside = [], []
    for key, flags in mask.items():
        size = state[key].abs().where(before.get(key, torch.ones_like(flags)), -torch.inf)
        assert not (flags & (size == -torch.inf)).any(), f"{key}: weights come back"
        assert size[flags].max() >= size.max() - ROUNDING, f"{key}: the largest is gone"
        free = flags.clone().view(-1)
        free[size.where(flags, -torch.inf).argmax()] = False
        inside.append(size.view(-1)[free])
        outside.append(size[~flags])
    assert torch.cat(inside).min() >= torch.cat(outside).max() - ROUNDING


def assert_uneven(run: Run) -> None:
    """Every client has another n_k, and no epoch of anyone ends in a batch of one image."""
    sizes = [part.size for part in run.partition]
    assert len(set(sizes)) == len(sizes)
    assert max(sizes) > 4 * min(sizes)
    assert all(size % run.config.batch != 1 for size in sizes)
