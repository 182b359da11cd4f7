# SPDX-License-Identifier: Apache-2.0
"""How long messages are: masks against their entropy, values in each dtype, plain and deflated.

    python lab/007_wire/measure.py masks     # a minute
    python lab/007_wire/measure.py values    # trains for some minutes
"""

from __future__ import annotations

import sys
import time
import zlib

import numpy as np

from fedpai import data, models, pruning
from fedpai.federation import coding
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import Layout, MaskSet
from fedpai.federation.payload import DType
from fedpai.federation.runner import Run

MASKS = [
    (criterion, sparsity, structure)
    for criterion, structure in (
        ("uniform", "weight"), ("erk", "weight"), ("grasp", "weight"), ("random", "16x1"), ("random", "channel")
    )
    for sparsity in (0.98, 0.95, 0.9, 0.5)
]  # fmt: skip
STRATEGIES = {"Huffman": zlib.Z_HUFFMAN_ONLY, "RLE": zlib.Z_RLE, "filtered": zlib.Z_FILTERED, "default": 0}


def entropy(mask: MaskSet) -> float:
    """Bytes that a mask of these layers' densities takes at least, its positions being random."""
    bits = 0.0
    for slot, where in mask.parts():
        p = (where.stop - where.start) / slot.size
        bits -= slot.size * sum(q * np.log2(q) for q in (p, 1 - p) if q)
    return bits / 8


def masks() -> None:
    """One line a mask: every way that was tried, over the entropy, and what `coding` chooses of them."""
    model = models.create("resnet18", in_channels=1, seed=1)
    layout = Layout.of(model)
    batch = pruning.balanced_batch(data.load("fashion-mnist"), np.arange(5000), 10, seed=0)
    for criterion, sparsity, structure in MASKS:
        chosen = pruning.prune(model, sparsity, criterion, data=batch, seed=1, structure=structure)
        mask = MaskSet.from_masks(layout, chosen)
        bits, least = mask.bits(), entropy(mask)
        gaps = coding._gaps(mask.positions)
        sizes = {
            f"{form} {name}": len(coding._deflated(raw, strategy)) / least
            for form, raw in (("bitmap", bits), ("gaps", gaps))
            for name, strategy in STRATEGIES.items()
        }
        start = time.perf_counter()
        how, body = coding.pack_mask(bits)
        spent = 1e3 * (time.perf_counter() - start)
        text = "  ".join(f"{name} {size:.3f}" for name, size in sizes.items())
        print(f"{criterion} {structure} {sparsity}: entropy {least:.0f} bytes, bitmap {len(bits) / least:.2f}  {text}")
        print(f"    chosen: {how.name} {len(body)} bytes, {len(body) / least:.3f} of it, {spent:.0f} ms")


def values() -> None:
    """One line a model and dtype: bytes of the values of one message, as they are and deflated."""
    for method, clients, images in (("fedpai-u", 4, 512), ("fedavg", 2, 64)):
        config = RunConfig(method=method, clients=clients, sample=clients, rounds=2, max_images=images, eval_images=10)
        run = Run(config)
        run.finish()
        server = run.arms[0].federation.server
        for dtype in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16):
            exact = 0 if dtype is DType.FLOAT32 else run.layout.other_count
            _, plain = coding.pack_floats(server.floats, dtype, exact, False)
            start = time.perf_counter()
            how, short = coding.pack_floats(server.floats, dtype, exact, True)
            spent = 1e3 * (time.perf_counter() - start)
            start = time.perf_counter()
            coding.unpack_floats(memoryview(short), how, dtype, server.floats.size, exact)
            back = 1e3 * (time.perf_counter() - start)
            print(
                f"{method} {dtype.name}: {len(plain)} bytes, deflated {len(short)} = {len(short) / len(plain):.3f}, "
                f"{spent:.0f} ms and {back:.0f} ms; no planes: "
                + "  ".join(f"{k} {len(coding._deflated(plain, s)) / len(plain):.3f}" for k, s in STRATEGIES.items())
            )


if __name__ == "__main__":
    {"masks": masks, "values": values}[sys.argv[1]]()
