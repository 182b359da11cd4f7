# SPDX-License-Identifier: Apache-2.0
"""The activations that are computed together with what comes before them, and how torch's spellings are told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NONE", "RELU", "Activation", "activation_of_call", "activation_of_module", "chosen"]

# In the order of ActivationKind in csrc/cpu/norm/activation.h.
_KINDS = ("none", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh")
_TITLES = ("nothing", "the ReLU", "the ReLU6", "the LeakyReLU", "the SiLU", "the GELU", "the GELU")
_SMOOTH = _KINDS.index("silu")


class Activation(NamedTuple):
    """
    Attributes:
        kind: "none", "relu", "relu6", "leaky_relu", "silu", "gelu" or "gelu_tanh".
        slope: of "leaky_relu" below zero, not negative; else 0.
    """

    kind: str
    slope: float = 0.0

    @property
    def code(self) -> int:
        """What the kernels call the kind."""
        return _KINDS.index(self.kind)

    @property
    def title(self) -> str:
        return _TITLES[self.code]


NONE, RELU = Activation("none"), Activation("relu")


def is_smooth(code: int) -> bool:
    """Whether the gradient cannot be read from the result, so that what went in is kept."""
    return code >= _SMOOTH


def in_torch(x: Tensor, code: int, slope: float) -> Tensor:
    """The activation in plain torch."""
    kind = _KINDS[code]
    if kind == "leaky_relu":
        return F.leaky_relu(x, slope)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    same = {"none": lambda y: y, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu}
    return same[kind](x)


def slope_at_result(z: Tensor, code: int, slope: float) -> Tensor:
    """The derivative of a piecewise linear activation where its result is z."""
    kind = _KINDS[code]
    if kind == "leaky_relu":
        return torch.where(z > 0, 1.0, slope).to(z.dtype)
    return ((z > 0) & (z < 6) if kind == "relu6" else z > 0).to(z.dtype)


def chosen(relu: bool, activation: Activation | str | None) -> Activation:
    """The activation that the two arguments of :func:`fedpai_kernels.ops.norm.batch_norm` name.

    Raises:
        ValueError: both are given; an unknown kind; a slope that is negative, not finite, or of another kind.
    """
    if activation is None:
        return RELU if relu else NONE
    if relu:
        raise ValueError(f"relu, activation: expected one of them, got True and {activation!r}")
    made = Activation(activation) if isinstance(activation, str) else activation
    if made.kind not in _KINDS:
        raise ValueError(f"activation: expected one of {', '.join(_KINDS)}, got {made.kind!r}")
    if not 0.0 <= made.slope < float("inf") or (made.slope and made.kind != "leaky_relu"):
        raise ValueError(
            f"activation: expected a finite slope >= 0, and one of leaky_relu only, got {made.slope} for {made.kind}"
        )
    return made


# ---- torch's spellings
# ----------------------------------------------------------------------------------------------------------------


def _leaky(slope: Any = 0.01) -> Activation | None:
    if type(slope) not in (int, float) or not 0.0 <= slope < float("inf"):  # kernels read the sign from the result
        return None
    return Activation("leaky_relu", float(slope))


def _hard(low: Any = -1.0, high: Any = 1.0) -> Activation | None:
    known = type(low) in (int, float) and type(high) in (int, float) and low == 0 and high == 6
    return Activation("relu6") if known else None


def _gelu(approximate: Any = "none") -> Activation | None:
    kinds = {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}
    return kinds.get(approximate) if isinstance(approximate, str) else None


def _fixed(kind: str) -> Callable[[], Activation]:
    made = Activation(kind)
    return lambda: made


# By function or name of a method: the names of what may follow the input, and what they make.
_Call = tuple[tuple[str, ...], Callable[..., "Activation | None"]]
_LEAKY, _HARD = ("negative_slope",), ("min_val", "max_val")
_CALLS: dict[Any, _Call] = {
    F.relu: (("inplace",), _fixed("relu")),
    **dict.fromkeys((torch.relu, Tensor.relu, "relu"), ((), _fixed("relu"))),
    F.relu6: (("inplace",), _fixed("relu6")),
    F.hardtanh: ((*_HARD, "inplace"), _hard),
    F.leaky_relu: ((*_LEAKY, "inplace"), _leaky),
    F.silu: (("inplace",), _fixed("silu")),
    F.gelu: (("approximate",), _gelu),
}
_CALLS_IN_PLACE: dict[Any, _Call] = {
    **dict.fromkeys((torch.relu_, Tensor.relu_, F.relu_, "relu_"), ((), _fixed("relu"))),
    F.hardtanh_: (_HARD, _hard),
    F.leaky_relu_: (_LEAKY, _leaky),
}


def activation_of_call(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Activation, bool] | None:
    """Which activation a call is, and whether it works in place; None for anything else.

    Args:
        function: a function, or the name of a method.
        args, kwargs: those of the call, the input first.
    """
    names, make = _CALLS.get(function) or _CALLS_IN_PLACE.get(function) or ((), None)
    if make is None or not 1 <= len(args) <= 1 + len(names):
        return None
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    if len(given) != len(args) - 1 + len(kwargs) or not given.keys() <= set(names):
        return None
    in_place = given.pop("inplace", False)
    if type(in_place) is not bool:
        return None
    made = make(*(given[name] for name in names if name in given)) if _without_gaps(names, given) else None
    return None if made is None else (made, in_place or function in _CALLS_IN_PLACE)


def _without_gaps(names: tuple[str, ...], given: Mapping[str, Any]) -> bool:
    """Whether what is given comes first; hardtanh(x, max_val=6) is no ReLU6."""
    return [name for name in names if name in given] == list(names[: len(given)])


def activation_of_module(module: nn.Module) -> Activation | None:
    """Which activation a module of torch's own is; None for anything else."""
    kind = type(module)
    if kind is nn.ReLU:
        return RELU
    if isinstance(module, nn.Hardtanh) and kind in (nn.ReLU6, nn.Hardtanh):
        return _hard(module.min_val, module.max_val)
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return _gelu(module.approximate)
    return Activation("silu") if kind is nn.SiLU else None
