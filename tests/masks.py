# SPDX-License-Identifier: Apache-2.0
"""Masks of the cases, by name: random ones, extreme ones, and structures whose channels are walked together.

A mask is named by a key of MASKS or by a structure (docs/structure.md), which keeps a share of its blocks, channels or
weights, and what is changed in it: ``"16x1"``, ``"8x8-taps lost shuffled"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpai_kernels.structure import Block, Channel, FanIn, NOfM, grouped, parse

if TYPE_CHECKING:
    from tests.cases import Case


def _random(case: Case, generator: torch.Generator) -> Tensor:
    mask = torch.rand(case.mask_shape, generator=generator) < case.density
    mask.view(-1)[mask.numel() // 2] = True  # a plan needs a weight
    return mask


def _full(case: Case, _: torch.Generator) -> Tensor:
    return torch.ones(case.mask_shape, dtype=torch.bool)


def _first_weight(case: Case, _: torch.Generator) -> Tensor:
    mask = torch.zeros(case.mask_shape, dtype=torch.bool)
    mask.view(-1)[0] = True
    return mask


def _last_weight(case: Case, _: torch.Generator) -> Tensor:
    mask = torch.zeros(case.mask_shape, dtype=torch.bool)
    mask.view(-1)[-1] = True
    return mask


def _empty_row(case: Case, generator: torch.Generator) -> Tensor:
    mask = _random(case, generator)
    mask[0] = mask[-1] = mask[mask.shape[0] // 2] = False
    mask[1, 0] = True
    return mask


def _empty_column(case: Case, generator: torch.Generator) -> Tensor:
    mask = _random(case, generator)
    mask[:, 0] = mask[:, -1] = mask[:, mask.shape[1] // 2] = False
    mask[0, 1] = True
    return mask


def _one_row(case: Case, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(case.mask_shape, dtype=torch.bool)
    mask[-2] = _random(case, generator)[-2]
    mask[-2, -1] = True
    return mask


def _one_column(case: Case, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(case.mask_shape, dtype=torch.bool)
    mask[:, -2] = _random(case, generator)[:, -2]
    mask[-1, -2] = True
    return mask


def _one_tap(case: Case, generator: torch.Generator) -> Tensor:
    """Only the kernel's last corner occurs, so the patches that are packed have no halo, but a shift."""
    mask = _random(case, generator)
    mask[..., :-1, :] = False
    mask[..., :, :-1] = False
    mask.view(-1)[-1] = True
    return mask


def _heavy_row(case: Case, generator: torch.Generator) -> Tensor:
    """One output channel has nearly all the weights: no even split of the channels is fair."""
    mask = _random(case, generator)
    mask[1] = True
    return mask


def _diagonal(case: Case, _: torch.Generator) -> Tensor:
    mask = torch.zeros(case.mask_shape, dtype=torch.bool)
    for i in range(min(mask.shape[:2])):
        mask[i, i] = True
    return mask


def _empty_group(case: Case, generator: torch.Generator) -> Tensor:
    mask = _random(case, generator)
    mask[: case.mask_shape[0] // case.groups] = False
    mask[-1] = True
    return mask


MASKS: dict[str, Callable[[Case, torch.Generator], Tensor]] = {
    "random": _random,
    "full": _full,
    "first_weight": _first_weight,
    "last_weight": _last_weight,
    "empty_row": _empty_row,
    "empty_column": _empty_column,
    "one_row": _one_row,
    "one_column": _one_column,
    "one_tap": _one_tap,
    "heavy_row": _heavy_row,
    "diagonal": _diagonal,
    "empty_group": _empty_group,
}


# ----------------------------------------------------------------------------------------------------- structures


def _blocks(weights: Tensor, block: Block, density: float, generator: torch.Generator) -> Tensor:
    groups, out, columns, taps = weights.shape
    places = groups, -(-out // block.rows), -(-columns // block.columns), 1 if block.taps else taps
    kept = torch.rand(places, generator=generator) < density
    kept.view(-1)[kept.numel() // 2] = True
    kept = kept.repeat_interleave(block.rows, 1)[:, :out].repeat_interleave(block.columns, 2)[:, :, :columns]
    return kept.expand_as(weights)


def _structured(case: Case, name: str, generator: torch.Generator) -> Tensor:
    """A mask of the structure of that name."""
    weights = grouped(torch.rand(case.mask_shape, generator=generator), case.groups)
    groups, out, columns, _ = weights.shape
    structure = parse(name)
    if isinstance(structure, Block):
        kept = _blocks(weights, structure, case.density, generator)
    elif isinstance(structure, Channel):
        outputs, inputs = (torch.rand(groups, n, generator=generator) < case.density for n in (out, columns))
        outputs[:, 0] = inputs[:, -1] = True
        kept = (outputs[:, :, None] & inputs[:, None])[..., None].expand_as(weights)
    elif isinstance(structure, NOfM):
        kept = torch.cat([run.argsort(2).argsort(2) < structure.n for run in weights.split(structure.m, 2)], 2)
    elif isinstance(structure, FanIn):
        rows = weights.flatten(2)
        kept = rows.argsort(2).argsort(2) < max(1, int(case.density * rows.shape[2]))
    else:
        kept = weights < case.density
    return kept.reshape(case.mask_shape).clone()


def _lost(mask: Tensor, generator: torch.Generator) -> Tensor:
    """A few weights fewer, so that rows are only nearly alike."""
    return mask & (torch.rand(mask.shape, generator=generator) >= 0.08)


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Output and input channels in another order, so that those that are alike are no neighbours."""
    rows, columns = (torch.randperm(n, generator=generator) for n in mask.shape[:2])
    return mask[rows][:, columns]


def _empty_borders(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Without the outer eighth of the output and input channels."""
    rows, columns = (max(1, n // 8) for n in mask.shape[:2])
    mask[:rows] = mask[-rows:] = False
    mask[:, :columns] = mask[:, -columns:] = False
    return mask


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "lost": _lost,
    "shuffled": _shuffled,
    "empty_borders": _empty_borders,
}


def make_mask(case: Case) -> Tensor:
    """The case's mask: bool, of the weight's shape, with at least one weight."""
    generator = case.generator()
    if case.mask in MASKS:
        return MASKS[case.mask](case, generator)
    structure, *changes = case.mask.split()
    mask = _structured(case, structure, generator)
    for change in changes:
        mask = CHANGES[change](mask, generator)
    if not mask.any():
        mask.view(-1)[mask.numel() // 2] = True
    return mask
