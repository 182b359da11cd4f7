# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: one row per convolution or linear layer, and notes on the modules around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..dispatch import layers
from ..ops.geometry import flatten, resolve_geometry
from ..ops.linear import GEOMETRY
from ..plan import Plan
from ..structure import describe

__all__ = ["DirectionRow", "LayerRow", "Report"]


@dataclass(frozen=True)
class DirectionRow:
    """What was chosen for one direction of a layer on a CUDA device.

    Attributes:
        direction: "forward", "input_grad" or "weight_grad".
        call: on what it was chosen: batch, image, dtype, device.
        kernel: "sparse", "blocks" or "dense" (:data:`fedpai_kernels.dispatch.BACKENDS`).
        reason: the times that were measured, and why the other kernels were not.
    """

    direction: str
    call: str
    kernel: str
    reason: str


def directions_of(module: Any) -> tuple[DirectionRow, ...]:
    """Of a layer with a plan, those that have run on a CUDA device; layers of one mask and geometry have the same."""
    plan: Plan = module.plan
    if plan.kind == "linear":
        geometry = GEOMETRY
    else:
        # What is not zeros is padded before the convolution.
        padding = module.padding if module.padding_mode == "zeros" else 0
        geometry = flatten(resolve_geometry(module.kernel_size, module.stride, padding, module.dilation))
    found = layers.CHOOSER.choices(plan, geometry)
    return tuple(DirectionRow(call.direction, str(call), made.candidate, made.reason) for call, made in found.items())


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: the module's name in the model.
        kind: "conv2d" or "linear".
        shape: of the weight.
        nnz: surviving weights.
        density: their share.
        structure: how they were arranged before channels were removed, as :func:`fedpai_kernels.structure.describe`
            names it; "dense" without a mask.
        kernel: "sparse", or "dense" (with a masked weight where there is a mask).
        reason: why that kernel.
        activation_dtype: "bfloat16" where the input is kept so for the backward pass; None: as it is.
        original_shape: of the weight, where channels were removed; else None. `shape`, `nnz` and `density` are those of
            what is left.
        directions: what was chosen on CUDA devices; :func:`fedpai_kernels.report` fills it. `kernel` and `reason` are
            those of the CPU.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    density: float
    structure: str
    kernel: str
    reason: str
    activation_dtype: str | None = None
    original_shape: tuple[int, ...] | None = None
    directions: tuple[DirectionRow, ...] = ()

    @classmethod
    def of_plan(
        cls,
        name: str,
        plan: Plan,
        kernel: str,
        reason: str,
        activation_dtype: str | None,
        original: tuple[Tensor, int] | None = None,
    ) -> LayerRow:
        """Of a layer with a mask; `original` is that mask and its groups, before channels were removed."""
        structure = plan.structure if original is None else describe(*original)
        counts, before = (plan.nnz, plan.density), None if original is None else tuple(original[0].shape)
        head = name, plan.kind, plan.mask_shape, *counts, structure
        return cls(*head, kernel, reason, activation_dtype, before)


@dataclass
class Report:
    """Iterable of :class:`LayerRow` in the order of the model; prints as a table."""

    rows: list[LayerRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_json(self) -> str:
        """A JSON object with `rows` (one object per layer) and `notes`."""
        return json.dumps({"rows": [asdict(row) for row in self.rows], "notes": self.notes})

    def __str__(self) -> str:
        head = ("layer", "kind", "weight", "kept", "density", "structure", "kernel", "reason")
        body = [
            (
                row.name,
                row.kind,
                _sizes(row.shape) + (f" of {_sizes(row.original_shape)}" if row.original_shape else ""),
                str(row.nnz),
                f"{row.density:.4f}",
                row.structure,
                row.kernel,
                row.reason,
            )
            for row in self.rows
        ]
        numel = sum(round(row.nnz / row.density) for row in self.rows if row.density)
        nnz = sum(row.nnz for row in self.rows)
        if numel:
            body.append(("total", "", "", str(nnz), f"{nnz / numel:.4f}", "", "", ""))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = (3, 4)
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *body)
        ]
        chosen = [f"{row.name}: {d.call}: {d.kernel}, {d.reason}" for row in self.rows for d in row.directions]
        return "\n".join([*lines, *self.notes, *chosen])


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
