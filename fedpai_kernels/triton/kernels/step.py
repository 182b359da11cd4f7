# SPDX-License-Identifier: Apache-2.0
"""One optimiser step over the parameters of a whole model, each element read once and written once.

    SGD    g = sign * g + weight_decay * p
           b = momentum * b + undamped * g                       the first time b = g
           p = p + minus_lr * (b; with Nesterov g + momentum * b; without momentum g)
    Adam   g = sign * g + weight_decay * p, or p = keep * p      AdamW
           m = m + pull * (g - m),  v = beta2 * v + (1 - beta2) * g * g
           p = p + minus_step * m / (sqrt(v) / correction + eps)

The order of operations is that of csrc/cpu/optim/kernels-inl.h. Division and root are rounded correctly.

Layout: p, g and the state are vectors of float32, changed in place but for g; factors: 8 float32 on the same device, so
that a captured graph takes new ones (a learning rate, a step count) by a copy into them. A factor that is zero is
skipped by a constant of the kernel, as torch skips it: 0 * inf would be NaN.
Bound: memory, 12 bytes an element (SGD), 20 with momentum, 28 (Adam).

Time on a GPU: not measured yet (docs/triton.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

ELEMENTS = 1024


@triton.jit
def factor(factors, i: tl.constexpr, ELEMENTS: tl.constexpr):
    """The i-th factor in every lane: a fused multiply-add takes no scalars."""
    return tl.zeros((ELEMENTS,), tl.float32) + tl.load(factors + i)


@triton.jit
def sgd_kernel(
    p, g, buffer, factors, size,
    DECAYS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,  # the buffer holds nothing yet
    NESTEROV: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(size / ELEMENTS),). factors: sign, weight_decay, momentum, undamped, minus_lr."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    value = tl.load(p + element, mask=inside)
    step = tl.load(g + element, mask=inside) * tl.load(factors)
    if DECAYS:
        step = tl.fma(value, factor(factors, 1, ELEMENTS), step)
    if MOMENTUM:
        momentum = factor(factors, 2, ELEMENTS)
        average = step
        if not FIRST:
            before = tl.load(buffer + element, mask=inside)
            average = tl.fma(step, factor(factors, 3, ELEMENTS), before * momentum)
        tl.store(buffer + element, average, mask=inside)
        if NESTEROV:
            step = tl.fma(average, momentum, step)
        else:
            step = average
    tl.store(p + element, tl.fma(step, factor(factors, 4, ELEMENTS), value), mask=inside)


@triton.jit
def adam_kernel(
    p, g, m, v, factors, size,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,  # decay as in AdamW
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(size / ELEMENTS),). factors: sign, decay (AdamW: 1 - lr * weight_decay), pull, beta2, 1 - beta2,
    correction, eps, minus_step."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    value = tl.load(p + element, mask=inside)
    grad = tl.load(g + element, mask=inside) * tl.load(factors)
    if DECAYS:
        decay = factor(factors, 1, ELEMENTS)
        if DECOUPLED:
            value = value * decay
        else:
            grad = tl.fma(value, decay, grad)
    mean = tl.load(m + element, mask=inside)
    mean = tl.fma(factor(factors, 2, ELEMENTS), grad - mean, mean)
    square = tl.load(v + element, mask=inside) * tl.load(factors + 3)
    square = tl.fma(tl.load(factors + 4) * grad, grad, square)
    tl.store(m + element, mean, mask=inside)
    tl.store(v + element, square, mask=inside)
    correction = factor(factors, 5, ELEMENTS)
    scale = tl.div_rn(tl.sqrt_rn(square), correction) + tl.load(factors + 6)
    tl.store(p + element, value + tl.div_rn(tl.load(factors + 7) * mean, scale), mask=inside)
