# SPDX-License-Identifier: Apache-2.0
"""Times both gradients of single layers: one after the other, tiled or as the cost models choose, and in one walk.

    python lab/011_joint_backward/measure.py [--threads 1] [--batch 64] [--isa avx2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fedpai_kernels as fk
from fedpai_kernels import _C

ROUNDS = 9
OTHER_DATA = 8 << 20  # floats that are touched between two calls, as the rest of a training step would
# in, out, image, kernel, stride
LAYERS = (
    (64, 64, 32, 3, 1), (64, 128, 32, 3, 2), (64, 128, 32, 1, 2), (128, 128, 16, 3, 1), (256, 256, 8, 3, 1),
    (256, 512, 8, 3, 2), (512, 512, 4, 3, 1), (512, 512, 2, 3, 1),
)  # fmt: skip


def medians(contenders: dict[str, tuple[str, Callable[[], object]]]) -> dict[str, float]:
    """Milliseconds of each, taking turns; a contender is the walk that is forced, and a call."""
    other = torch.zeros(OTHER_DATA)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (walk, call) in contenders.items():
            _C.force_walk(walk)
            call()
            other.add_(1)
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    _C.force_walk("choose")
    return {name: statistics.median(found) for name, found in times.items()}


def measure(size: tuple[int, int, int, int, int], density: float, batch: int) -> dict[str, float]:
    i, o, image, kernel, stride = size
    plan = fk.Plan.from_mask(torch.rand(o, i, kernel, kernel) < density)
    values, x = torch.randn(plan.nnz), fk.to_batch_last(torch.randn(batch, i, image, image))
    ops, geometry = torch.ops.fedpai, [stride, stride, *[kernel // 2] * 4, 1, 1]
    dy = torch.randn_like(ops.conv2d_forward(x, values, None, plan.handle, geometry))

    def apart() -> None:
        ops.conv2d_input_grad(dy, values, plan.handle, image, image, geometry)
        ops.conv2d_weight_grad(x, dy, plan.handle, False, geometry)

    def together() -> None:
        ops.conv2d_backward(x, dy, values, plan.handle, False, geometry)

    return medians({
        "tiled": ("tiled", apart),
        "chosen": ("choose", apart),
        "one walk": ("streamed", together),
        "as in training": ("choose", together),
    })


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--isa", default=fk.isa(), choices=fk.available_isas())
    parser.add_argument("--densities", default="0.01,0.02,0.05,0.1,0.2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    fk.set_isa(arguments.isa)
    for size in LAYERS:
        i, o, image, kernel, stride = size
        for density in map(float, arguments.densities.split(",")):
            found = measure(size, density, arguments.batch)
            shown = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
            print(f"{i}-{o} {kernel}x{kernel}/{stride} @{image}, {density:g}: {shown} ms", flush=True)


if __name__ == "__main__":
    main()
