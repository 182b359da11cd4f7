# SPDX-License-Identifier: Apache-2.0
"""SGD and Adam over all parameters of a model that lie in one vector: one launch a step.

    packed = optim.Packed(model.parameters())            # parameters and gradients become views of two vectors
    factors = optim.sgd_factors(lr=0.1, momentum=0.9).to(device)
    ...
    packed.zero_grad(); loss.backward()
    optim.sgd_step(packed.values, packed.grads, factors, buffer=buffer)

Results are those of :mod:`fedpai_kernels.optim` and of torch, up to the last bit of a fused multiply-add. Factors lie
on the device: a captured graph takes another learning rate or the next step of Adam by a copy into the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .runtime import check_device, current

__all__ = ["Packed", "adam_factors", "adam_step", "sgd_factors", "sgd_step"]


class Packed:
    """Parameters laid side by side, and their gradients likewise.

    Attributes:
        values, grads: (elements,), float32. Every parameter and its `.grad` is a view of them from now on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the parameters into one vector; gradients start at zero.

        Raises:
            TypeError: a parameter that is not float32.
            ValueError: no parameters, one given twice, or parameters on several devices.
        """
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters: got none, expected at least one")
        if len({id(p) for p in self._parameters}) < len(self._parameters):
            raise ValueError("parameters: one is given twice")
        device = self._parameters[0].device
        for i, p in enumerate(self._parameters):
            if p.dtype != torch.float32:
                raise TypeError(f"parameters[{i}]: expected dtype torch.float32, got {p.dtype}")
            if p.device != device:
                raise ValueError(f"parameters[{i}]: expected the device of parameters[0], {device}, got {p.device}")
        self.values = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self.grads = torch.zeros_like(self.values)
        self._views = []
        start = 0
        for p in self._parameters:
            own = slice(start, start + p.numel())
            p.data = self.values[own].view(p.shape)
            self._views.append(self.grads[own].view(p.shape))
            start = own.stop
        self.zero_grad()

    def zero_grad(self) -> None:
        """Sets every gradient to zero, in place: one launch. A gradient that was replaced is a view again."""
        self.grads.zero_()
        for p, view in zip(self._parameters, self._views, strict=True):
            p.grad = view


def sgd_factors(
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """What :func:`sgd_step` takes: computed in double, rounded once, on the CPU. Arguments as of
    :class:`torch.optim.SGD`.

    Raises:
        ValueError: a factor that cannot be.
    """
    _check_factors(lr=lr, momentum=momentum, weight_decay=weight_decay)
    sign = -1.0 if maximize else 1.0
    return torch.tensor([sign, weight_decay, momentum, 1.0 - dampening, -lr, 0.0, 0.0, 0.0], dtype=torch.float32)


def adam_factors(
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> Tensor:
    """What :func:`adam_step` takes for its so many-th step, the first being 1. Arguments as of
    :class:`torch.optim.Adam`.

    Raises:
        ValueError: a factor that cannot be.
    """
    _check_factors(lr=lr, eps=eps, weight_decay=weight_decay)
    if step < 1:
        raise ValueError(f"step: got {step}, expected 1 or more")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas: got {betas}, expected 0 <= beta < 1")
    beta1, beta2 = betas
    decay = 1.0 - lr * weight_decay if decoupled else weight_decay
    correction = math.sqrt(1.0 - beta2**step)
    minus_step = -(lr / (1.0 - beta1**step))
    sign = -1.0 if maximize else 1.0
    return torch.tensor(
        [sign, decay, 1.0 - beta1, beta2, 1.0 - beta2, correction, eps, minus_step], dtype=torch.float32
    )


def sgd_step(
    values: Tensor,
    grads: Tensor,
    factors: Tensor,
    *,
    buffer: Tensor | None = None,
    first: bool = False,
    nesterov: bool = False,
    weight_decay: bool = False,
) -> None:
    """One step of SGD, in place.

    Args:
        values, grads: (elements,), float32, adjacent.
        factors: :func:`sgd_factors`, on the same device.
        buffer: the momentum, likewise, changed in place; None without momentum.
        first: the buffer holds nothing yet, and takes the gradient.
        nesterov: needs a buffer.
        weight_decay: whether that factor is anything but 0.

    Raises:
        TypeError, ValueError: tensors that do not fit, or `nesterov` without a buffer.
        RuntimeError: Triton is not installed.
    """
    state = {} if buffer is None else {"buffer": buffer}
    if nesterov and buffer is None:
        raise ValueError("nesterov: needs momentum, so expected a buffer, got None")
    _check_vectors({"values": values, "grads": grads, **state}, factors)
    import triton

    from .kernels.step import ELEMENTS, sgd_kernel

    with current(values.device):
        sgd_kernel[(triton.cdiv(values.numel(), ELEMENTS),)](
            values, grads, values if buffer is None else buffer, factors, values.numel(), DECAYS=weight_decay,
            MOMENTUM=buffer is not None, FIRST=first, NESTEROV=nesterov, ELEMENTS=ELEMENTS,
        )  # fmt: skip


def adam_step(
    values: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    factors: Tensor,
    *,
    weight_decay: bool = False,
    decoupled: bool = False,
) -> None:
    """One step of Adam, or with `decoupled` weight decay of AdamW, in place.

    Args:
        values, grads, m, v: (elements,), float32, adjacent; m and v start at zero.
        factors: :func:`adam_factors` of this step, on the same device.
        weight_decay: whether that factor is anything but 0.
        decoupled: as given to :func:`adam_factors`.

    Raises:
        TypeError, ValueError: tensors that do not fit.
        RuntimeError: Triton is not installed.
    """
    _check_vectors({"values": values, "grads": grads, "m": m, "v": v}, factors)
    import triton

    from .kernels.step import ELEMENTS, adam_kernel

    with current(values.device):
        adam_kernel[(triton.cdiv(values.numel(), ELEMENTS),)](
            values, grads, m, v, factors, values.numel(), DECAYS=weight_decay, DECOUPLED=decoupled, ELEMENTS=ELEMENTS
        )


def _check_factors(**factors: float) -> None:
    for name, factor in factors.items():
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"{name}: got {factor}, expected a finite number of at least 0")


def _check_vectors(vectors: dict[str, Tensor], factors: Tensor) -> None:
    for name, vector in (*vectors.items(), ("factors", factors)):
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(vector).__name__}")
        if vector.dtype != torch.float32:
            raise TypeError(f"{name}: expected dtype torch.float32, got {vector.dtype}")
    values = vectors["values"]
    for name, vector, size in (*((n, t, values.numel()) for n, t in vectors.items()), ("factors", factors, 8)):
        if tuple(vector.shape) != (size,) or not vector.is_contiguous():
            raise ValueError(f"{name}: expected {size} adjacent elements, got shape {tuple(vector.shape)}, strides "
                             f"{vector.stride()}")  # fmt: skip
        if vector.device != values.device:
            raise ValueError(f"{name}: expected the device of values, {values.device}, got {vector.device}")
    check_device(values)
