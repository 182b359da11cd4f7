# SPDX-License-Identifier: Apache-2.0
"""A layer to compute, and what all contenders have in common: their graphs, calls and the check against the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedpai.bench.cases import LayerCase
from fedpai.bench.masks import uniform_mask
from fedpai_kernels import Plan
from fedpai_kernels.ops import reference

CPU = torch.device("cpu")
# Largest error in float32, as a share of the largest entry, that counts as rounding. A misplaced index gives one far
# larger.
TOLERANCE = 1e-4


class Unavailable(Exception):
    """This contender cannot compute the layer; the text says why."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer with its mask, weights, input and upstream gradient.

    Attributes:
        case: sizes.
        batch: images.
        mask: bool, of the weight's shape.
        weight: float32, zero outside of the mask, on the CPU.
        x, dy: contiguous, on the CPU.
        compiled: whether dense torch is tried compiled as well.
        place: where it is to be computed.
    """

    case: LayerCase
    batch: int
    mask: Tensor
    weight: Tensor
    x: Tensor
    dy: Tensor
    compiled: bool = False
    place: torch.device = CPU

    @classmethod
    def make(
        cls,
        case: LayerCase,
        batch: int,
        mask: Tensor | float,
        *,
        compiled: bool = False,
        seed: int = 0,
        place: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Problem:
        """Draws weights and tensors from normal distributions; `mask` may be a density, `dtype` is that of x and dy."""
        if isinstance(mask, float):
            mask = uniform_mask(case.weight_shape, mask)
        generator = torch.Generator().manual_seed(seed)
        x, dy = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in (case.input_shape(batch), case.output_shape(batch))
        )
        return cls(case, batch, mask, _weight(mask, seed), x, dy, compiled, place)

    def with_mask(self, mask: Tensor) -> Problem:
        """The same problem under another mask, with the same x and dy."""
        return replace(self, mask=mask, weight=_weight(mask, 0))

    @cached_property
    def plan(self) -> Plan:
        """The compiled mask."""
        return Plan.from_mask(self.mask, groups=self.case.groups)

    @cached_property
    def values(self) -> Tensor:
        """Packed weights."""
        return self.plan.pack(self.weight)

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """By the dense-masked reference in float64: "forward", "input-grad", "weight-grad" (packed)."""
        x, values = (t.double().requires_grad_() for t in (self.x, self.values))
        if self.case.kind == "linear":
            y = reference.linear(x, values, self.plan)
        else:
            c = self.case
            y = reference.conv2d(x, values, self.plan, None, c.stride, c.padding, c.dilation, c.groups)
        dx, dvalues = torch.autograd.grad(y, (x, values), self.dy.double())
        return {"forward": y.detach(), "input-grad": dx, "weight-grad": dvalues}


def _weight(mask: Tensor, seed: int) -> Tensor:
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    # A survivor that is exactly zero would be no survivor to those who find the mask in the weight.
    weight[mask & (weight == 0)] = 1.0
    return weight


class Contender:
    """One way to compute a layer, ready to be timed.

    Every direction is reached through autograd, as training reaches it. Gradients that are timed alone have a
    graph of their own, in which nothing else requires one.

    Attributes:
        variant: layout or algorithm, the word in the result rows.
        calls: {direction: call}; a direction that the contender cannot do alone is missing.
    """

    def __init__(
        self,
        variant: str,
        apply: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        dy: Tensor,
        *,
        separable: bool = True,
        packed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            variant: see above.
            apply: (x, weight) to y.
            x, weight, dy: in the layouts that suit the contender best; weight in any form.
            separable: whether either gradient can be computed without the other.
            packed: from a gradient of `weight` to the packed gradient, for the check.
        """
        self.variant = variant
        self._apply, self._dy = apply, dy
        self._x, self._weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        self._packed = packed if packed is not None else (lambda gradient: gradient)
        self.calls: dict[str, Callable[[], object]] = {"forward": self._forward, "train": self._train}
        if separable:
            self.calls["input-grad"] = self._gradient((self._x, weight.detach()), (self._x,))
            self.calls["weight-grad"] = self._gradient((x.detach(), self._weight), (self._weight,))
        both = (self._x, self._weight)
        self.calls["backward"] = self._gradient(both, both)

    def _forward(self) -> Tensor:
        return self._apply(self._x, self._weight)

    def _train(self) -> tuple[Tensor, ...]:
        both = (self._x, self._weight)
        return torch.autograd.grad(self._apply(*both), both, self._dy)

    def _gradient(
        self, operands: tuple[Tensor, Tensor], wanted: tuple[Tensor, ...]
    ) -> Callable[[], tuple[Tensor, ...]]:
        y: list[Tensor] = []

        def call() -> tuple[Tensor, ...]:
            if not y:  # first call, which is not timed
                y.append(self._apply(*operands))
            return torch.autograd.grad(y[0], wanted, self._dy, retain_graph=True)

        return call

    def error(self, problem: Problem) -> float:
        """Largest difference from the reference, as a share of the reference's largest entry, over the
        output and both gradients. Infinite if anything is not finite.
        """
        dx, dweight = self._train()
        found = {
            "forward": self._forward().detach(), "input-grad": dx, "weight-grad": self._packed(dweight)
        }  # fmt: skip
        worst = 0.0
        for direction, expected in problem.expected.items():
            got = found[direction].double().cpu()
            if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
                return float("inf")
            scale = max(float(expected.abs().max()), 1e-30)
            worst = max(worst, float((got - expected).abs().max()) / scale)
        return worst
