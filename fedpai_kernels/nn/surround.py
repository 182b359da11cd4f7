# SPDX-License-Identifier: Apache-2.0
"""The modules around sparse convolutions: their batch-last forms, and what is computed together with their norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..tuning import BreakEvens
from .conv2d import BatchLastConv2d, MaskedConv2d
from .deferred import DeferrableBatchNorm2d, DeferrableGroupNorm, attach
from .fuse import Fusions
from .group_norm import BatchLastGroupNorm, BatchLastInstanceNorm2d
from .norm import BatchLastBatchNorm2d
from .packed import PackedWeight
from .pool import BatchLastAdaptiveAvgPool2d, BatchLastAvgPool2d, BatchLastMaxPool2d

__all__ = ["PLAIN", "refuse_parametrised", "surround_"]

Filter = Callable[[nn.Module, str], bool]

# Exact types: a subclass may compute something else.
_BATCH_LAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchLastBatchNorm2d,
    nn.GroupNorm: BatchLastGroupNorm,
    nn.InstanceNorm2d: BatchLastInstanceNorm2d,
    nn.MaxPool2d: BatchLastMaxPool2d,
    nn.AvgPool2d: BatchLastAvgPool2d,
    nn.AdaptiveAvgPool2d: BatchLastAdaptiveAvgPool2d,
    nn.Conv2d: BatchLastConv2d,
}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    **{ours: theirs for theirs, ours in _BATCH_LAST.items()},
    DeferrableBatchNorm2d: nn.BatchNorm2d,
    DeferrableGroupNorm: nn.GroupNorm,
}


def surround_(names: dict[str, nn.Module], wanted: Filter, fusions: Fusions, figures: BreakEvens) -> list[str]:
    """Gives the modules around sparse convolutions their batch-last forms; what it did, for the report."""
    name_of = {id(module): name for name, module in names.items()}
    counts: dict[str, int] = {}
    for name, module in names.items():
        if isinstance(module, MaskedConv2d):
            module.batch_last = True
        elif type(module) in _BATCH_LAST and wanted(module, name):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
            module.__class__ = _BATCH_LAST[type(module)]
            if isinstance(module, BatchLastConv2d) and module.full_fan_in != figures.full_fan_in:
                module.full_fan_in = figures.full_fan_in
    notes = [f"batch-last: {', '.join(f'{n} {kind}' for kind, n in counts.items())}"] if counts else []
    fused: dict[str, int] = {}
    alone = dict(fusions.others)

    def may(what: str, norm: nn.Module, *others: nn.Module) -> bool:
        if not all(wanted(module, name_of[id(module)]) for module in (norm, *others)):
            alone[name_of[id(norm)]] = "left out by filter_fn"
            return False
        title = f"{'group' if isinstance(norm, nn.GroupNorm) else 'batch'} norms with {what}"
        fused[title] = fused.get(title, 0) + 1
        return True

    for owner, site in fusions.sites:
        if may(site.what, *site.computed(owner)):
            attach(owner, site)
    notes += [f"fused: {n} {title} after them" for title, n in fused.items()]
    if fusions.untraced:
        return [*notes, f"norms not fused: {fusions.untraced}"]
    if alone:
        notes.append("not fused: " + ", ".join(f"{name} ({reason})" for name, reason in alone.items()))
    return notes


def refuse_parametrised(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises TypeError for a module of ours whose parameters lie in the class that `densify_` would change."""
    for name, module in modules:
        if is_parametrized(module) and (isinstance(module, PackedWeight) or type(module).__base__ in PLAIN):
            raise TypeError(
                f"{name or 'model'}: {type(module).__name__} has parametrised "
                f"{', '.join(module.parametrizations)}, expected plain parameters; call "  # type: ignore[arg-type]
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
