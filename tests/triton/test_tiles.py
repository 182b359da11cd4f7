# SPDX-License-Identifier: Apache-2.0
"""How work is cut: all of it, once, in pieces that the kernels can take. Needs no Triton."""

from __future__ import annotations

import pytest
import torch

from fedpai_kernels.triton import BLOCKS
from fedpai_kernels.triton.tiles import parts, walk_tile, weight_grad_tile


@pytest.mark.parametrize("positions", [1, 31, 64, 65, 1000, 131_072, 10**8])
@pytest.mark.parametrize("count", [1, 7, 300, 5000])
def test_parts_cover_every_pixel_once(count: int, positions: int) -> None:
    for depth in (32, 64):
        number, size = parts(count, positions, depth)
        assert size % depth == 0
        assert (number - 1) * size < positions <= number * size
        assert number == 1 or size >= 8 * depth
        assert number * count >= 900 or size < 16 * depth  # programs for a whole GPU, if there are pixels for them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", BLOCKS)
def test_tiles_divide_blocks(block: int, dtype: torch.dtype) -> None:
    for positions in (1, 64, 65, 10**6):
        tile = walk_tile(block, dtype, positions)
        assert block % tile.depth == 0
        assert tile.depth >= 16
        assert tile.pixels >= min(64, positions)
    assert weight_grad_tile(block, dtype).depth >= 16
