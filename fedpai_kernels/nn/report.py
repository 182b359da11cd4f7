# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: one row per convolution or linear layer, and notes on the modules around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

__all__ = ["LayerRow", "Report"]


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        name: the module's name in the model.
        kind: "conv2d" or "linear".
        shape: of the weight.
        nnz: surviving weights.
        density: their share.
        kernel: "sparse", or "dense" (with a masked weight where there is a mask).
        reason: why that kernel.
        activation_dtype: "bfloat16" where the input is kept so for the backward pass; None: as it is.
        original_shape: of the weight, where channels were removed; else None. `shape`, `nnz` and `density` are those of
            what is left.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    density: float
    kernel: str
    reason: str
    activation_dtype: str | None = None
    original_shape: tuple[int, ...] | None = None


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
        head = ("layer", "kind", "weight", "kept", "density", "kernel", "reason")
        body = [
            (
                row.name,
                row.kind,
                _sizes(row.shape) + (f" of {_sizes(row.original_shape)}" if row.original_shape else ""),
                str(row.nnz),
                f"{row.density:.4f}",
                row.kernel,
                row.reason,
            )
            for row in self.rows
        ]
        numel = sum(round(row.nnz / row.density) for row in self.rows if row.density)
        nnz = sum(row.nnz for row in self.rows)
        if numel:
            body.append(("total", "", "", str(nnz), f"{nnz / numel:.4f}", "", ""))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = (3, 4)
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *body)
        ]
        return "\n".join([*lines, *self.notes])


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
