# SPDX-License-Identifier: Apache-2.0
"""Merging on a GPU gives the bits of merging on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedpai_kernels import aggregate as on_cpu
from fedpai_kernels.triton import aggregate
from tests.triton.checking import DEVICE, needs_kernels

SIZES = (1, 31, 32, 1024, 2500)


def clients(size: int, number: int) -> tuple[list[Tensor], list[float]]:
    """Vectors, and weights of which products round."""
    generator = torch.Generator().manual_seed(size)
    vectors = [torch.randn(size, generator=generator) * 10.0**k for k in range(number)]
    return vectors, (torch.rand(number, generator=generator, dtype=torch.float64) + 0.1).tolist()


def weights_there(weights: list[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64, device=DEVICE)


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
def test_mean_has_the_bits_of_the_cpu(size: int) -> None:
    vectors, weights = clients(size, 7)
    expected = on_cpu.weighted_mean(vectors, weights)
    got = aggregate.weighted_mean(torch.stack(vectors).to(DEVICE), weights_there(weights))
    assert torch.equal(got.cpu(), expected)


@needs_kernels
def test_mean_of_rows_with_gaps() -> None:
    vectors, weights = clients(33, 3)
    sea = torch.full((3, 50), float("nan"), device=DEVICE)
    sea[:, :33] = torch.stack(vectors)
    got = aggregate.weighted_mean(sea[:, :33], weights_there(weights))
    assert torch.equal(got.cpu(), on_cpu.weighted_mean(vectors, weights))


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
def test_masked_mean_has_the_bits_of_the_cpu(size: int) -> None:
    """Clients that keep everything, nothing and some; elements that nobody keeps."""
    generator = torch.Generator().manual_seed(size)
    kept = [torch.rand(size, generator=generator) < density for density in (0.3, 0.0, 0.05, 0.7)]
    kept.append(torch.ones(size, dtype=torch.bool))
    for mask in kept:
        mask[size // 2 : size // 2 + 40] = False
    positions = [mask.nonzero().squeeze(1).int() for mask in kept]
    vectors = [torch.randn(len(places), generator=generator) for places in positions]
    weights = (torch.rand(len(kept), generator=generator, dtype=torch.float64) + 0.1).tolist()
    old = torch.randn(size, generator=generator)
    expected = on_cpu.masked_mean(old, vectors, positions, weights)
    masks = aggregate.ClientMasks([places.to(DEVICE) for places in positions], size)
    values = torch.cat(vectors).to(DEVICE)
    got = aggregate.masked_mean(old.to(DEVICE), values, masks, weights_there(weights))
    assert torch.equal(got.cpu(), expected)


@needs_kernels
def test_what_a_client_does_not_keep_adds_nothing() -> None:
    masks = aggregate.ClientMasks([torch.tensor([0, 2]).to(DEVICE), torch.tensor([2]).to(DEVICE)], 4)
    values = torch.tensor([float("inf"), 1.0, 3.0], device=DEVICE)
    old = torch.tensor([5.0, 6.0, 7.0, float("nan")], device=DEVICE)
    got = aggregate.masked_mean(old, values, masks, weights_there([1.0, 1.0])).cpu()
    assert torch.equal(got[:3], torch.tensor([float("inf"), 6.0, 2.0]))
    assert got[3].isnan()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "positions: got none"),
        ([[0, 1], [3, 3]], r"positions\[1\]: expected ascending positions without repeats in \[0, 5\)"),
        ([[0, 5]], r"positions\[0\]: expected ascending positions"),
        ([[-1, 2]], r"positions\[0\]: expected ascending positions"),
    ],
)
def test_positions_that_cannot_be(positions: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate.ClientMasks([torch.tensor(places) for places in positions], 5)


def test_arguments_are_checked_first() -> None:
    values, weights = torch.zeros(2, 3), torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"values: expected dtype torch\.float32, got torch.float64"):
        aggregate.weighted_mean(values.double(), weights)
    with pytest.raises(ValueError, match=r"values: expected 2 dimensions, got shape \(2,\)"):
        aggregate.weighted_mean(values[:, 0], weights)
    masks = aggregate.ClientMasks([torch.tensor([0, 2])], 3)
    with pytest.raises(ValueError, match=r"values: expected 2 adjacent elements, got shape \(3,\)"):
        aggregate.masked_mean(torch.zeros(3), torch.zeros(3), masks, weights)


@needs_kernels
def test_weights_that_do_not_fit() -> None:
    values, weights = torch.zeros(2, 3, device=DEVICE), weights_there([1.0, 2.0])
    with pytest.raises(TypeError, match=r"weights: expected dtype torch\.float64, got torch.float32"):
        aggregate.weighted_mean(values, weights.float())
    with pytest.raises(ValueError, match="weights: got 1 for 2 clients"):
        aggregate.weighted_mean(values, weights[:1])
    with pytest.raises(ValueError, match=r"values: expected rows of adjacent elements, got strides \(1, 2\)"):
        aggregate.weighted_mean(torch.zeros(3, 2, device=DEVICE).t(), weights)
