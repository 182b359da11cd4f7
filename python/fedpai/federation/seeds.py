# SPDX-License-Identifier: Apache-2.0
"""Every random draw of a run, derived from its seed and from where in the run it happens.

No generator lives across rounds. A draw depends on (seed, purpose, round, client) only, so a resumed run
makes the same draws as an uninterrupted one, and a client's draws do not depend on who trained before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit seed for one purpose at one place of the run."""
    words = [seed & 0xFFFFFFFF, seed >> 32, zlib.crc32(purpose.encode()), *where]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def generator(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """A NumPy generator for one purpose at one place of the run."""
    return np.random.default_rng(derive(seed, purpose, *where))


@contextmanager
def torch_seed(seed: int, purpose: str, *where: int) -> Iterator[None]:
    """Runs a block under a derived torch seed (dropout, for one) and restores torch's generator after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, purpose, *where))
        yield
