# SPDX-License-Identifier: Apache-2.0
"""Merging clients' values on a server, each result one launch for a whole model.

    mean          out_j = sum_k n_k w_kj / sum_k n_k
    masked mean   out_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj ;  old_j where nobody keeps j

Sums are float64, in the order of the clients, rounded once after the division; launches forbid fused multiply-adds.
So the bits are those of fedpai_kernels.aggregate on the CPU. Memory is the bound even where float64 runs at a 64th of
the rate.

Layout: values of the mean (clients, size), rows `client_stride` elements apart, columns adjacent. Masked: the values
of all clients one after the other; words (clients, ceil(size / 32)) int32, bit j % 32 of word j / 32 set where client
k keeps j; ranks of the same shape, int32: where the value of a word's first set bit lies. So a value is found by
counting bits, and a client costs 2 bits for each element besides 4 bytes for each value; out is written once. Outputs
are overwritten.

Time on a GPU: not measured yet (docs/triton.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

ELEMENTS = 1024
"""Elements of one program; a multiple of 32."""


@triton.jit
def mean_kernel(values, weights, out, clients, size, client_stride, ELEMENTS: tl.constexpr):
    """Grid: (ceil(size / ELEMENTS),)."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    sums = tl.zeros((ELEMENTS,), tl.float64)
    total = tl.zeros((1,), tl.float64)
    own = values + element
    for client in range(clients):
        weight = tl.load(weights + client)
        sums += weight * tl.load(own, mask=inside, other=0.0).to(tl.float64)
        total += weight
        own += client_stride
    tl.store(out + element, (sums / total).to(tl.float32), mask=inside)


@triton.jit
def count_bits(word):
    """Set bits of each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return word & 0x3F


@triton.jit
def masked_mean_kernel(values, words, ranks, weights, old, out, clients, size, row, ELEMENTS: tl.constexpr):
    """Grid: (ceil(size / ELEMENTS),). `row`: words of a client."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    bit = (element % 32).to(tl.uint32)
    sums = tl.zeros((ELEMENTS,), tl.float64)
    totals = tl.zeros((ELEMENTS,), tl.float64)
    place = element // 32
    for client in range(clients):
        weight = tl.load(weights + client)
        word = tl.load(words + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
        shifted = word >> bit
        kept = (shifted & 1) != 0
        # Bits below this one: all of the word less those from here on.
        before = (count_bits(word) - count_bits(shifted)).to(tl.int32)
        rank = tl.load(ranks + place, mask=inside, other=0) + before
        value = tl.load(values + rank, mask=kept, other=0.0).to(tl.float64)
        # Selected, not multiplied: a client that does not keep an element adds nothing, whatever lies there.
        sums = tl.where(kept, sums + weight * value, sums)
        totals = tl.where(kept, totals + weight, totals)
        place += row
    before = tl.load(old + element, mask=inside, other=0.0)
    merged = (sums / tl.where(totals > 0, totals, 1.0)).to(tl.float32)
    tl.store(out + element, tl.where(totals > 0, merged, before), mask=inside)
