# SPDX-License-Identifier: Apache-2.0
"""How large the pieces are that one program of a block kernel computes: one setting per block size, no search.

A search at the first call would break the capture of a graph, and make the bits of a gradient depend on what was
measured. These figures follow from shared memory and registers; no GPU has measured them yet (docs/triton.md). Bytes of
shared memory are buffers * (pixels + B) * depth * element for a walk, of which a program may have 163 KB (sm_80) or
227 KB (sm_90); tests/triton/test_compiled.py sees what the compiler makes of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_TARGET_PROGRAMS = 1024
"""Into about how many programs the weight gradient of a layer is cut at least, if it has the pixels: several per SM of
the largest GPUs. A constant, so that its bits are the same on all of them."""

_FEWEST_STEPS = 8
"""Steps of a part of the weight gradient, at least, where there are several: less would be all start and end."""


_WALK_STAGES = 7
"""A step of the walk waits for two loads in turn, of the list and of the pixels that it names, among which the compiler
divides the stages: with 7 it keeps three steps of pixels under way, with 4 (sm_80) a single one."""

_WEIGHT_GRAD_STAGES = 4


class Tile(NamedTuple):
    pixels: int  # destination pixels of a program (weight gradient: unused, 0)
    depth: int  # summed channels (weight gradient: pixels) of a step
    warps: int
    stages: int  # of the software pipeline


def walk_tile(block: int, dtype: torch.dtype, positions: int) -> Tile:
    """For forward and input gradient, of so many destination pixels (per phase)."""
    pixels = 128 if positions > 64 else 64
    depth = min(block, 32 if dtype == torch.float32 else 64)
    return Tile(pixels, depth, 8 if block * pixels > 64 * 128 else 4, _WALK_STAGES)


def weight_grad_tile(block: int, dtype: torch.dtype) -> Tile:
    return Tile(0, 32 if dtype == torch.float32 else 64, 8 if block == 128 else 4, _WEIGHT_GRAD_STAGES)


def parts(count: int, positions: int, depth: int) -> tuple[int, int]:
    """Into how many parts the pixels of a weight gradient of so many blocks are cut, and the pixels of a part."""
    steps = -(-positions // depth)
    wanted = min(-(-_TARGET_PROGRAMS // count), max(1, steps // _FEWEST_STEPS))
    steps_per_part = -(-steps // wanted)
    return -(-steps // steps_per_part), steps_per_part * depth
