# SPDX-License-Identifier: Apache-2.0
"""Merging from tensors to the CUDA kernels' arguments, with a library whose device is the CPU: the bits of
:mod:`fedpai_kernels.aggregate`."""

from __future__ import annotations

import pytest
import torch

import fedpai_kernels as fk

pytestmark = pytest.mark.usefixtures("merging_on_host")


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("n", [0, 1, 1023, 5000])
def test_mean_has_the_bits_of_the_cpu(n: int, compensated: bool) -> None:
    """Of rows that are read in place, with weights as numbers and as a tensor, and of columns, which are copied."""
    vectors, weights = torch.randn(7, n + 3)[:, :n], [1.0, 3.0, 2.0, 7.0, 5.0, 11.0, 4.0]
    expected = fk.aggregate.weighted_mean(list(vectors), weights, compensated=compensated)
    there = torch.tensor(weights, dtype=torch.float64)
    for rows, given in ((vectors, weights), (vectors, there), (vectors.t().contiguous().t(), weights)):
        assert torch.equal(fk.cuda.weighted_mean(rows, given, compensated=compensated), expected)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("n", "share"), [(0, 0.5), (1, 1.0), (1025, 0.02), (5000, 0.3)])
def test_masked_mean_has_the_bits_of_the_cpu(n: int, share: float, compensated: bool) -> None:
    """Of two rounds with one set of masks."""
    masks = [torch.rand(n) < share for _ in range(5)]
    at = [mask.nonzero().flatten().int() for mask in masks]
    positions = fk.cuda.Positions(at, n)
    for weights in ([1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 1.0, 1.0, 7.0, 2.0]):
        old, own = torch.randn(n), [torch.randn(len(places)) for places in at]
        got = fk.cuda.masked_mean(old, torch.cat(own), positions, weights, compensated=compensated)
        assert torch.equal(got, fk.aggregate.masked_mean(old, own, at, weights, compensated=compensated))


@pytest.mark.parametrize("wrong", [[5, 5], [6, 5], [-1, 5], [5, 9]])
def test_wrong_positions_name_their_client(wrong: list[int]) -> None:
    good, bad = torch.tensor([0, 5], dtype=torch.int32), torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^positions\[1\]: expected ascending"):
        fk.cuda.Positions([good, bad, good], 9)
