# SPDX-License-Identifier: Apache-2.0
"""Times forward and both gradients of single layers by the sparse kernel at many densities, and by the dense ones.

    python lab/004_break_even/measure.py [threads]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear

ROUNDS = 7
BATCHES = (64, 16)
# in, out, image, kernel, stride, groups
CONVS = (
    (3, 64, 32, 3, 1, 1), (64, 64, 32, 3, 1, 1), (128, 128, 16, 3, 1, 1), (256, 256, 8, 3, 1, 1),
    (512, 512, 4, 3, 1, 1), (64, 128, 32, 3, 2, 1), (64, 128, 32, 1, 2, 1), (128, 128, 16, 1, 1, 1),
    (96, 96, 16, 3, 1, 4),
)  # fmt: skip
CONV_DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# batch, in, out
LINEARS = ((64, 512, 10), (64, 512, 512), (64, 784, 300), (256, 3072, 768), (2048, 768, 3072))
LINEAR_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)

Run = Callable[[], None]


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Run:
    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    return run


def fastest(runs: dict[str, Run], one_thread: bool) -> dict[str, float]:
    """Seconds of each, taking turns."""
    clock = time.process_time if one_thread else time.perf_counter
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def show(title: str, best: dict[str, float], densities: tuple[float, ...]) -> None:
    rivals = {name: seconds for name, seconds in best.items() if not name[0].isdigit()}
    print(f"{title}: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in rivals.items()))
    for name, seconds in rivals.items():
        ratios = " ".join(f"{d:g}:{seconds / best[str(d)]:.2f}" for d in densities)
        print(f"    {name} / sparse  {ratios}", flush=True)


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for batch in BATCHES:
        for i, o, image, kernel, stride, groups in CONVS:
            conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
            x = torch.randn(batch, i, image, image, requires_grad=i > 3)
            dy = torch.randn_like(conv(x))
            last = fk.to_batch_last(x.detach()).requires_grad_(i > 3), fk.to_batch_last(dy)
            masked = MaskedConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.5)
            masked.batch_last = True
            runs = {"dense": step(conv, x, dy), "masked among batch-last": step(masked, *last)}
            for d in CONV_DENSITIES:
                mask = torch.rand_like(conv.weight) < d
                runs[str(d)] = step(SparseConv2d.from_dense(conv, mask), *last)
            title = f"batch {batch}, {i}-{o} {kernel}x{kernel}/{stride} @{image} groups {groups}"
            show(title, fastest(runs, threads == 1), CONV_DENSITIES)
    for batch, i, o in LINEARS:
        linear = nn.Linear(i, o)
        x, dy = torch.randn(batch, i, requires_grad=True), torch.randn(batch, o)
        runs = {
            "dense": step(linear, x, dy),
            "masked": step(MaskedLinear.from_dense(linear, torch.rand_like(linear.weight) < 0.2), x, dy),
        }
        for d in LINEAR_DENSITIES:
            runs[str(d)] = step(SparseLinear.from_dense(linear, torch.rand_like(linear.weight) < d), x, dy)
        show(f"batch {batch}, linear {i}-{o}", fastest(runs, threads == 1), LINEAR_DENSITIES)


if __name__ == "__main__":
    main()
