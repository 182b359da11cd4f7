# SPDX-License-Identifier: Apache-2.0
"""Activations in plain torch, and in more digits than the dtype has."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpai_kernels.ops.activation import Activation

__all__ = ["ALL", "BY_NAME", "EXACT", "PIECEWISE", "SMOOTH", "reference"]

LEAKY = Activation("leaky_relu", 0.1)
PIECEWISE: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "relu": (Activation("relu"), torch.relu),
    "relu6": (Activation("relu6"), F.relu6),
    "leaky_relu": (LEAKY, lambda x: F.leaky_relu(x, 0.1)),
    "leaky_relu_zero": (Activation("leaky_relu", 0.0), lambda x: F.leaky_relu(x, 0.0)),
    "leaky_relu_steep": (Activation("leaky_relu", 2.5), lambda x: F.leaky_relu(x, 2.5)),
}
SMOOTH: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": (Activation("silu"), F.silu),
    "gelu": (Activation("gelu"), F.gelu),
    "gelu_tanh": (Activation("gelu_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}
ALL = {**PIECEWISE, **SMOOTH}
BY_NAME = {name: activation for name, (activation, _) in ALL.items()}

Number = mpmath.mpf


def _sigmoid(x: Number) -> Number:
    return 1 / (1 + mpmath.exp(-x))


def _silu(x: Number) -> tuple[Number, Number]:
    return x * _sigmoid(x), _sigmoid(x) * (1 + x * _sigmoid(-x))


def _gelu(x: Number) -> tuple[Number, Number]:
    below = mpmath.erfc(-x / mpmath.sqrt(2)) / 2
    return x * below, below + x * mpmath.npdf(x)


def _gelu_tanh(x: Number) -> tuple[Number, Number]:
    a = mpmath.sqrt(8 / mpmath.pi)
    s, c = (_sigmoid(sign * a * (x + mpmath.mpf("0.044715") * x**3)) for sign in (1, -1))
    return x * s, s + x * s * c * a * (1 + 3 * mpmath.mpf("0.044715") * x**2)


EXACT: dict[str, Callable[[Number], tuple[Number, Number]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def reference(name: str, x: Tensor) -> tuple[list[Number], list[Number]]:
    """The activation and its derivative at every element, with 40 digits."""
    with mpmath.workdps(40):
        pairs = [EXACT[name](mpmath.mpf(value)) for value in x.tolist()]
    return [y for y, _ in pairs], [d for _, d in pairs]
