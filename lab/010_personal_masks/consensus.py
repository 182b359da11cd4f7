# SPDX-License-Identifier: Apache-2.0
"""Personal masks that lean on everybody's scores: accuracy by how much; one line a run.

    python lab/010_personal_masks/consensus.py --lean dense,1,0.9,0.5,0 --alpha iid,0.5

The study's networks, clients and rounds (preset `study`), at one sparsity. A client's own model is scored on its own mix
of classes in three states: `trained`, at the end of its turn (over the last three rounds' clients); after the last
round as it would be `received`, that is merged, under the client's mask; and the same `calibrated`, with the running
statistics of its norms taken from its own images, no weight changed (both over all clients).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import torch

from fedpai import pruning
from fedpai.compare.presets import PRESETS
from fedpai.data import Dataset
from fedpai.federation.aggregate import weighted_mean
from fedpai.federation.client import Client
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.runner import Run, load_data
from fedpai.federation.server import Server, Update
from fedpai.methods import METHODS
from fedpai.methods.base import only
from fedpai.methods.fedavg import FedAvg
from fedpai.methods.fedpai_u import FedPaiU
from fedpai.methods.fixed import chooser
from fedpai.pruning import balanced_batch


class Dense(FedAvg):
    """Dense federated averaging whose clients' own models are scored too."""

    name = "dense"
    personal = True  # type: ignore[assignment]


class Leaning(FedPaiU):
    """Client k keeps the best of (1 - lean) s_k + lean s, s the mean of all scores by n_k; the server tells it which."""

    name = "leaning"
    lean = 0.0
    per_class = 10
    own_norms = False
    """Whether what belongs to no masked weight (norms with their running statistics, biases) stays on the client."""
    shared = 1.0
    """Of a client's weights, the share that another's mask has too, on average, once masks are chosen."""

    @property
    def personal(self) -> bool:
        """Every client ends with its own model."""
        return True

    def propose(self, client: Client) -> list[bytes]:
        """Scores, as for a shared mask."""
        data = balanced_batch(client.data, client.indices, self.per_class, seed=client.seed("scoring images"))
        scores = pruning.scores(client.model(), self.config.criterion, data=data, seed=client.seed("mask"))
        return [client.scores_message(client.layout.from_layers(scores))]

    def train(self, client: Client) -> None:
        """With the client's own norms, if it has any."""
        take_own(client)
        super().train(client)
        floats, mask = client.floats, client.memory.mask
        if self.own_norms and floats is not None and mask is not None:
            client.memory.extra["own"] = floats[mask.kept :].copy()

    def accept_proposal(self, server: Server, client: int, messages: list[bytes]) -> Update:
        """Scores."""
        return server.read_scores(client, only(messages))

    def agree(self, server: Server, updates: list[Update]) -> None:
        """Everybody's own mask."""
        scores = [update.scores for update in updates if update.scores is not None]
        mean = weighted_mean(scores, [update.examples for update in updates])
        choice = chooser(self.config, server.model())
        masks = {}
        for update, own in zip(updates, scores, strict=True):
            mixed = ((1 - self.lean) * own + self.lean * mean).astype(np.float32)
            masks[update.client] = MaskSet.from_masks(server.layout, choice.masks(server.layout.by_layer(mixed)))
        flat = [np.concatenate([m.numpy().ravel() for m in mask.masks().values()]) for mask in masks.values()]
        Leaning.shared = float(np.mean([(a & b).sum() / a.sum() for a, b in combinations(flat, 2)]))
        server.set_client_masks(masks)


def take_own(client: Client) -> None:
    """Replaces the merged norms by the client's own, where it keeps them."""
    own = client.memory.extra.get("own")
    if own is not None and client.floats is not None:
        client.floats = np.concatenate([client.floats[: -own.size], own])


@torch.no_grad()
def own_models(run: Run) -> tuple[float, float]:
    """Accuracy of the clients' models after the last merge: as received, and calibrated; means by n_k."""
    (arm,) = run.arms
    method, server, clients = arm.federation.method, arm.federation.server, arm.clients
    received, calibrated, examples = [], [], []
    for k in range(run.config.clients):
        me = clients._client(k, server.round)
        me.receive(method.send(server, k), method.takes)
        take_own(me)
        examples.append(me.examples)
        received.append(clients._personal_accuracy(me))
        bound = me.bound()
        model = bound.model.train()
        for _ in range(2):
            for indices in np.array_split(me.indices, len(me.indices) // run.config.batch):
                model(run.pool.images(bound, run.data.batch(indices, split="train")[0]))
        me.keep(bound)
        calibrated.append(clients._personal_accuracy(me))
    return float(np.average(received, weights=examples)), float(np.average(calibrated, weights=examples))


def measured(config: RunConfig, data: Dataset) -> dict[str, float]:
    """One run."""
    run = Run(config, data=data)
    last = run.finish()[-3:]
    received, calibrated = own_models(run)
    return {
        "trained": sum(row["personal_accuracy"] for row in last) / len(last),
        "received": received,
        "calibrated": calibrated,
        "global": last[-1]["accuracy"],
    }


def main() -> None:
    """Prints one JSON line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lean", default="dense,1,0.9,0.5,0")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--alpha", default="iid,0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--own-norms", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    METHODS.update({"leaning": Leaning, "dense": Dense})
    Leaning.per_class, Leaning.own_norms = arguments.per_class, arguments.own_norms
    preset = {key: value for key, value in PRESETS["study"].items() if not isinstance(value, list)}
    base = RunConfig(
        **preset, method="fedavg", model=arguments.model, sparsity=arguments.sparsity, threads=arguments.threads
    )
    data = load_data(base)
    for seed, alpha, lean in product(arguments.seeds.split(","), arguments.alpha.split(","), arguments.lean.split(",")):
        method = "dense" if lean == "dense" else "leaning"
        Leaning.lean = 0.0 if lean == "dense" else float(lean)
        config = replace(base, method=method, seed=int(seed), alpha=None if alpha == "iid" else float(alpha))
        found = {key: round(value, 4) for key, value in measured(config, data).items()}
        shared = 1.0 if lean == "dense" else round(Leaning.shared, 3)
        about = {"alpha": alpha, "seed": int(seed), "per_class": arguments.per_class, "own_norms": arguments.own_norms}
        about |= {"lean": lean, "shared": shared}
        print(json.dumps({**about, **found}), flush=True)


if __name__ == "__main__":
    main()
