# SPDX-License-Identifier: Apache-2.0
"""How much of a shared mask is left when its clients send less than exact scores; one line a form.

    python lab/008_coarse_scores/overlap.py --alpha iid,0.5 --allocation global,time
"""

from __future__ import annotations

import argparse
import zlib

import numpy as np
import torch

from fedpai import data, models, pruning
from fedpai.data import partition_dirichlet, partition_iid
from fedpai.federation import scores as wire
from fedpai.pruning.allocation import kept_count
from fedpai.pruning.masks import masks_from_counts, masks_from_scores

CLIENTS, PER_CLASS = 10, 10


class Scored:
    """Scores of one network by all clients, flat, and the exact shared mask."""

    def __init__(self, arguments: argparse.Namespace, alpha: str, seed: int = 0) -> None:
        dataset = data.load("fashion-mnist")
        self.sparsity = arguments.sparsity
        self.model = models.create(arguments.model, width=arguments.width, in_channels=1, seed=seed)
        if alpha == "iid":
            parts = partition_iid(dataset.train_labels, CLIENTS, seed=seed)
        else:
            parts = partition_dirichlet(dataset.train_labels, CLIENTS, float(alpha), seed=seed)
        self.examples = [len(part) for part in parts]
        found = [
            pruning.scores(self.model, "grasp", data=pruning.balanced_batch(dataset, part, PER_CLASS, seed=k), seed=k)
            for k, part in enumerate(parts)
        ]
        self.shapes = {name: score.shape for name, score in found[0].items()}
        self.flat = [torch.cat([s.flatten() for s in score.values()]).numpy() for score in found]
        self.kept = kept_count(self.flat[0].size, self.sparsity)

    def layers(self, vector: np.ndarray) -> dict[str, torch.Tensor]:
        out, at = {}, 0
        for name, shape in self.shapes.items():
            out[name] = torch.from_numpy(vector[at : at + shape.numel()]).view(shape)
            at += shape.numel()
        return out

    def mask(self, sent: list[np.ndarray], allocation: str) -> dict[str, torch.Tensor]:
        mean = sum(n * s.astype(np.float64) for n, s in zip(self.examples, sent, strict=True)) / sum(self.examples)
        return pruning.chooser(self.model, self.sparsity, allocation=allocation).masks(
            self.layers(mean.astype(np.float32))
        )


def best_only(scored: Scored, flat: np.ndarray, factor: int, exact: dict[str, torch.Tensor], allocation: str) -> np.ndarray:
    """A client's scores above its lowest candidate's, of its best so many times as many weights as are kept."""
    layers = scored.layers(flat)
    if allocation == "global":
        chosen = masks_from_scores(layers, 1 - factor * (1 - scored.sparsity))
        floors = dict.fromkeys(layers, min(float(s[chosen[n]].min()) for n, s in layers.items()))
    else:
        counts = {n: min(m.numel(), factor * int(m.sum())) for n, m in exact.items()}
        chosen = masks_from_counts(layers, counts)
        floors = {n: float(s[chosen[n]].min()) for n, s in layers.items()}
    return torch.cat([((s - floors[n]) * chosen[n]).flatten() for n, s in layers.items()]).numpy()


def rounded(flat: np.ndarray, kept: int, levels: float) -> tuple[np.ndarray, int]:
    """Scores in so many levels below tau, and the bytes of their deflated planes."""
    tau = np.sort(np.abs(flat))[-kept]
    q = np.rint(flat / (tau / levels)).clip(-32767, 32767)
    planes = q.astype("<i2").view(np.uint8).reshape(-1, 2).T.tobytes()
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_RLE)
    return (q * (tau / levels)).astype(np.float32), len(coder.compress(planes) + coder.flush())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--alpha", default="iid,0.5")
    parser.add_argument("--allocation", default="global,time")
    arguments = parser.parse_args()
    for alpha in arguments.alpha.split(","):
        scored = Scored(arguments, alpha)
        dense = 4 * scored.flat[0].size
        for allocation in arguments.allocation.split(","):
            exact = scored.mask(scored.flat, allocation)

            half = [torch.from_numpy(f).bfloat16().float().numpy() for f in scored.flat]
            forms = [("bfloat16", half, dense / 2)]
            for levels in (16, 8, wire.LEVELS, 2, 1):
                pairs = [rounded(f, scored.kept, levels) for f in scored.flat]
                size = float(np.mean([b for _, b in pairs]))
                forms.append((f"{levels} levels below tau", [s for s, _ in pairs], size))
            for factor in (1, 2, 4, 8):
                sent = [best_only(scored, f, factor, exact, allocation) for f in scored.flat]
                forms.append((f"best {factor} K only", sent, 4 * factor * scored.kept))
            for form, sent, size in forms:
                found = scored.mask(sent, allocation)
                both = sum(int((found[n] & exact[n]).sum()) for n in exact) / scored.kept
                shares = [pruning.summary(m, scored.model).mac_share for m in (found, exact)]
                print(
                    f"{alpha:5} {allocation:7} {form:20} bytes {size / dense:6.3f}  shared {both:.3f}  "
                    f"multiply-adds {shares[0]:.4f} (exact {shares[1]:.4f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
