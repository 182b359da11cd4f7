# SPDX-License-Identifier: Apache-2.0
"""Rounds of federated learning in dense float64 torch, written without the package's own training and merging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet, unpack
from fedpai.federation.payload import Kind, encode
from fedpai.federation.runner import Run, create_model
from fedpai.federation.seeds import generator
from fedpai.federation.server import Server
from fedpai.federation.server_opt import M, V

State = dict[str, Tensor]

GENTLE = 0.0001
"""Learning rate. At the default these few steps on noise amplify float32 rounding, dense torch's as much as ours,
beyond any bound that would still find a wrong merge; at five times this one they sometimes do."""
STRONG = 2.0
"""Weight decay. Of the default's effect, so few and gentle steps leave less than the bound."""
ROUNDING = 2e-6
"""How far float32 may be from float64 after these few steps; two weights closer than this may change places."""
STATE = {M: 5e-7, V: 5e-11}
"""The same of the server's m and v. One step without gradient takes 1e-8 of v, so v tells old state from new."""
SERVER_OPT: dict[str, dict[str, Any]] = {
    "none": {},
    "avgm": {"server_opt": "avgm", "server_lr": 0.7, "server_momentum": 0.8},
    "adam": {"server_opt": "adam", "server_lr": 0.02, "server_momentum": 0.8},
    "yogi": {"server_opt": "yogi", "server_lr": 0.02, "server_momentum": 0.8},
}
"""Settings with each optimiser of the server; its steps are about as long as the clients' mean is away."""


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
class ServerOptimiser:
    """The server's optimisers over dense float64 tensors, tensor by tensor, in the words of the papers.

    Attributes:
        m, v: state of every element that the model may have; at the start 0 and tau^2.
    """

    config: RunConfig
    m: State
    v: State

    BETA2: ClassVar[float] = 0.99
    TAU: ClassVar[float] = 1e-3

    @classmethod
    def of(cls, config: RunConfig, state: State) -> ServerOptimiser:
        """Before the first step, for the floats of a state_dict."""
        floats = {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}
        v = {key: torch.full_like(x, cls.TAU**2) for key, x in floats.items()}
        return cls(config, {key: torch.zeros_like(x) for key, x in floats.items()}, v)

    def stepped(self, key: str, x: Tensor, mean: Tensor) -> Tensor:
        """A parameter's next value, from the one that the clients were sent and the mean of what came back."""
        rule, lr, beta = self.config.server_opt, self.config.server_lr, self.config.server_momentum
        if rule == "none":
            return mean
        gradient = x - mean
        if rule == "avgm":  # torch's momentum is that of Hsu et al.
            self.m[key] = beta * self.m[key] + gradient
            return x - lr * self.m[key]
        self.m[key] = beta * self.m[key] + (1 - beta) * gradient
        square = gradient**2
        if rule == "adam":
            self.v[key] = self.BETA2 * self.v[key] + (1 - self.BETA2) * square
        else:
            self.v[key] = self.v[key] - (1 - self.BETA2) * square * torch.sign(self.v[key] - square)
        return x - lr * self.m[key] / (self.v[key].sqrt() + self.TAU)

    def move(self, stays: State) -> None:
        """Weights that leave lose their state, and those that come in start anew."""
        for key, kept in stays.items():
            self.m[key] = self.m[key] * kept
            self.v[key] = torch.where(kept, self.v[key], self.TAU**2)

    def assert_equal(self, server: Server) -> None:
        """The server's own state, whose m has the opposite sign (it steps along the change, not down a gradient)."""
        names = {"none": (), "avgm": (M,), "adam": (M, V), "yogi": (M, V)}[self.config.server_opt]
        assert names == tuple(name for name in (M, V) if name in server.extra)
        kept = keys_of(server.mask)
        for name, expected, sign in ((M, self.m, -1), (V, self.v, 1)):
            if name in names:
                dense = unpack(server.extra[name], server.mask, server.layout)
                actual = server.layout.scatter(dense, server.ints)
                for key, tensor in expected.items():
                    at = kept.get(key, torch.ones_like(tensor, dtype=torch.bool))
                    ours = sign * actual[key].double()
                    torch.testing.assert_close(ours[at], tensor[at], rtol=0, atol=STATE[name], msg=f"{name} of {key}")


@dataclass
class Restatement:
    """Dense local training and averaging; masks are multiplied in. Masks have the names of parameters.

    Attributes:
        run: only its settings, images and partition are used.
        state: the global model, float64.
        velocity: each client's momentum by parameter, where it is carried from turn to turn.
        optimiser: the server's, by the run's settings.
    """

    run: Run
    state: State = field(init=False)
    velocity: dict[int, State] = field(default_factory=dict)
    optimiser: ServerOptimiser = field(init=False)

    def __post_init__(self) -> None:
        model = create_model(self.run.config, self.run.data).double()
        self.state = model.state_dict()
        self.optimiser = ServerOptimiser.of(self.run.config, self.state)
        self.parameters = {key for key, _ in model.named_parameters()}

    def trained(
        self, number: int, client: int, masks: State, *, carry: bool = False, mu: float = 0.0, own: State | None = None
    ) -> State:
        """A client's model after its turn of one epoch, from the global model under its mask.

        v <- momentum v + (gradient + decay w + mu (w - w_t)) m,    w <- w - lr v
        """
        config, run = self.run.config, self.run
        model = create_model(config, run.data).double()
        model.load_state_dict(self.state if own is None else own)
        model.train()
        parameters = dict(model.named_parameters())
        ones = torch.ones((), dtype=torch.bool)
        for key, p in parameters.items():
            p.data *= masks.get(key, ones)
        start = {key: p.detach().clone() for key, p in parameters.items()}
        velocity = self.velocity.setdefault(client, {}) if carry else {}
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

    def mean(self, answers: dict[int, State], masks: dict[int, State] | None = None) -> State:
        """sum_k n_k m_k w_k / sum_k n_k m_k, where nobody keeps a weight the old one; of integers the largest.

        Args:
            masks: each client's; without them all m_k are 1.
        """
        n = {client: self.run.partition[client].size for client in answers}
        ones = torch.ones((), dtype=torch.bool)
        new = {}
        for key, old in self.state.items():
            if not old.is_floating_point():
                new[key] = torch.stack([answer[key] for answer in answers.values()]).amax(0)
                continue
            top, bottom = torch.zeros_like(old), torch.zeros_like(old)
            for client, answer in answers.items():
                mask = ones if masks is None else masks[client].get(key, ones)
                top += n[client] * mask * answer[key]
                bottom += n[client] * mask
            new[key] = torch.where(bottom > 0, top / bottom, old)
        return new

    def step(self, merged: State) -> None:
        """The server's step towards what was merged; running statistics and integers are taken as they are."""
        step, old = self.optimiser.stepped, self.state
        self.state = {
            key: step(key, old[key], mean) if key in self.parameters else mean for key, mean in merged.items()
        }

    def change(self, before: State, after: State) -> None:
        """Another mask (an empty one keeps everything): weights leave with their state, others come in at 0."""
        stays = {key: kept & before.get(key, torch.ones_like(kept)) for key, kept in after.items()}
        self.state.update({key: self.state[key] * kept for key, kept in stays.items()})
        self.optimiser.move(stays)

    def assert_equal(self, actual: State, expected: State | None = None) -> None:
        """Equal within the rounding of float32."""
        for key, tensor in (self.state if expected is None else expected).items():
            torch.testing.assert_close(actual[key].to(tensor.dtype), tensor, rtol=1e-3, atol=ROUNDING, msg=key)

    def assert_server(self, server: Server) -> None:
        """The server's model and the state of its optimiser."""
        self.assert_equal(self.run.layout.scatter(*server.dense()))
        self.optimiser.assert_equal(server)


def restated(
    run: Run,
    masks_of: dict[int, State],
    sampled: list[list[int]],
    settle: Callable[[State, State, State], None] = lambda answer, received, mask: None,
) -> Restatement:
    """The given rounds under masks that were chosen before them.

    Args:
        masks_of: each client's.
        sampled: the clients of each round.
        settle: changes a client's answer, from what it received under its mask.
    """
    dense = Restatement(run)
    union = {key: torch.stack([mask[key] for mask in masks_of.values()]).any(0) for key in masks_of[0]}
    dense.change({}, union)
    for number, clients in enumerate(sampled, start=1):
        answers = {client: dense.trained(number, client, masks_of[client]) for client in clients}
        for client, answer in answers.items():
            settle(answer, dense.state, masks_of[client])
        dense.step(dense.mean(answers, masks_of))
    return dense


def by_parameter(masks: State) -> State:
    """A layer's mask under the name of its weight."""
    return {f"{name}.weight": flags for name, flags in masks.items()}


def keys_of(mask: MaskSet | None) -> State:
    """A mask by the names of the parameters; of None nothing, which means all ones."""
    return {} if mask is None else by_parameter(mask.masks())


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
