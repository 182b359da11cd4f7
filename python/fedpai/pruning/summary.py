# SPDX-License-Identifier: Apache-2.0
"""What masks leave of a network: weights and multiply-adds, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fedpai.pruning.layers import Shape, input_shape_of
from fedpai_kernels.structure import describe


@dataclass(frozen=True)
class LayerSummary:
    """One convolution or linear layer. Multiply-adds are of the forward pass of one image, border included;
    the structure is the coarsest that its mask has."""

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: int
    total: int
    macs: int
    structure: str

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.kept / self.total

    @property
    def kept_macs(self) -> int:
        """Multiply-adds of the kept weights."""
        return self.kept * self.macs // self.total


@dataclass(frozen=True)
class Summary:
    """All convolutions and linear layers of a model; those without a mask count as dense."""

    rows: tuple[LayerSummary, ...]

    @property
    def kept(self) -> int:
        """Weights kept."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Weights there were."""
        return sum(row.total for row in self.rows)

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.kept / self.total

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense network."""
        return sum(row.macs for row in self.rows)

    @property
    def kept_macs(self) -> int:
        """Multiply-adds of the kept weights."""
        return sum(row.kept_macs for row in self.rows)

    @property
    def mac_share(self) -> float:
        """Share of the multiply-adds that is kept."""
        return self.kept_macs / self.macs

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        rows = [{**asdict(r), "density": r.density, "kept_macs": r.kept_macs} for r in self.rows]
        totals = ("kept", "total", "density", "macs", "kept_macs", "mac_share")
        return {"rows": rows, **{name: getattr(self, name) for name in totals}}

    def __str__(self) -> str:
        """A table: layer, shape, structure, weights kept, density, multiply-adds kept, share of all that are
        kept."""
        head = ("layer", "shape", "structure", "kept", "density", "MACs kept", "share")
        body = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                row.structure,
                f"{row.kept:,}",
                f"{row.density:.4f}",
                f"{row.kept_macs / 1e6:.2f} M",
                f"{row.kept_macs / max(1, self.kept_macs):.1%}",
            )
            for row in self.rows
        ]
        last = (
            "total",
            "",
            "",
            f"{self.kept:,}",
            f"{self.density:.4f}",
            f"{self.kept_macs / 1e6:.2f} M",
            f"({self.mac_share:.1%} of dense)",
        )
        lines = [head, *body, last]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def summary(
    masks: Mapping[str, torch.Tensor],
    model: nn.Module,
    image_size: int | None = None,
    *,
    input_shape: Shape | None = None,
) -> Summary:
    """Weights and multiply-adds that masks keep.

    Args:
        masks: ``{module name: bool tensor of the weight's shape}``.
        model: run once on a copy, on one blank image, to see the layers' output sizes; left as it is.
        image_size: side of the square image; by default that of ``model.input_shape``, else 32.
        input_shape: one input's whole shape, where channels and a square do not describe it.

    Raises:
        ValueError: a mask for a layer that is not there, or of another shape or dtype.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"masks: {name!r} is no convolution or linear layer of the model")
        if mask.dtype != torch.bool or mask.shape != layers[name].weight.shape:
            raise ValueError(
                f"masks: {name} is {mask.dtype} {tuple(mask.shape)}, "
                f"expected torch.bool {tuple(layers[name].weight.shape)}"
            )
    shape = input_shape_of(model, input_shape)
    if image_size is not None:
        shape = (shape[0], image_size, image_size)
    positions = output_positions(model, shape)
    rows = []
    for name, module in layers.items():
        total = module.weight.numel()
        kept, structure = total, "dense"
        if name in masks:
            kept = int(masks[name].sum())
            structure = describe(masks[name], int(getattr(module, "groups", 1)))
        kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        macs = total * positions.get(name, 0)
        rows.append(LayerSummary(name, kind, tuple(module.weight.shape), kept, total, macs, structure))
    return Summary(tuple(rows))


def output_positions(model: nn.Module, shape: Shape) -> dict[str, int]:
    """How often each layer's weight is applied to one image: pixels of its output, or rows of its input."""
    duplicate = copy.deepcopy(model).eval()
    counts: dict[str, int] = {}
    first = next(duplicate.parameters())

    def counter(name: str) -> Any:
        def count(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            features = output.shape[1] if output.dim() == 4 else output.shape[-1]
            counts[name] = counts.get(name, 0) + output.numel() // features

        return count

    for name, module in duplicate.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(counter(name))
    with torch.no_grad():
        duplicate(torch.zeros(1, *shape, dtype=first.dtype, device=first.device))
    return counts
