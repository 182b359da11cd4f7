# SPDX-License-Identifier: Apache-2.0
"""Personal masks that lean on everybody's scores: accuracy by how much; one line a run.

    python lab/010_personal_masks/consensus.py --lean 0,0.5,0.8,0.9,1 --alpha iid,0.5

The study's networks, clients and rounds (preset `study`), at one sparsity.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import combinations

import numpy as np

from fedpai import pruning
from fedpai.compare.presets import PRESETS
from fedpai.federation.aggregate import weighted_mean
from fedpai.federation.client import Client
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.runner import Run, load_data
from fedpai.federation.server import Server, Update
from fedpai.methods import METHODS
from fedpai.methods.base import only
from fedpai.methods.fedpai_u import FedPaiU
from fedpai.methods.fixed import chooser
from fedpai.pruning import balanced_batch


class Leaning(FedPaiU):
    """Client k keeps the best of (1 - lean) s_k + lean s, s the mean of all scores by n_k; the server tells it which."""

    name = "leaning"
    lean = 0.0
    per_class = 10
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


def main() -> None:
    """Prints one JSON line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lean", default="0,0.5,0.8,0.9,1")
    parser.add_argument("--per-class", default="10")
    parser.add_argument("--alpha", default="iid,0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    METHODS["leaning"] = Leaning
    preset = {key: value for key, value in PRESETS["study"].items() if not isinstance(value, list)}
    base = RunConfig(
        **preset, method="leaning", model=arguments.model, sparsity=arguments.sparsity, threads=arguments.threads
    )
    data = load_data(base)
    for seed in map(int, arguments.seeds.split(",")):
        for alpha in arguments.alpha.split(","):
            for per_class in map(int, arguments.per_class.split(",")):
                for lean in map(float, arguments.lean.split(",")):
                    Leaning.lean, Leaning.per_class = lean, per_class
                    config = replace(base, seed=seed, alpha=None if alpha == "iid" else float(alpha))
                    last = Run(config, data=data).finish()[-3:]
                    found = {
                        "alpha": alpha,
                        "seed": seed,
                        "per_class": per_class,
                        "lean": lean,
                        "shared": round(Leaning.shared, 3),
                        "personal_accuracy": round(sum(row["personal_accuracy"] for row in last) / len(last), 4),
                        "accuracy": last[-1]["accuracy"],
                    }
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
