# SPDX-License-Identifier: Apache-2.0
"""Conversion of whole models, in place: masked layers to packed ones and back, the layers around them to
batch-last.

Modules are converted by changing their class, so that every reference to them, their hooks, attributes and
unmasked parameters stay what they are. Everything is checked, and all masks are compiled, before the first
module is changed.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..memory import trim_heap
from ..plan import Plan
from ..tuning import BreakEvens, break_evens
from .choice import KernelChoice, LayerInfo, choose_kernel
from .conv2d import BatchLastConv2d, MaskedConv2d, SparseConv2d
from .deferred import DeferrableBatchNorm2d, attach, detach
from .fuse import Fusions, find_fusions
from .group_norm import BatchLastGroupNorm, BatchLastGroupNormReLU, BatchLastInstanceNorm2d
from .linear import MaskedLinear, SparseLinear
from .masks import checked_mask, is_pruned, mask_of, remove_pruning, unpruned_weight
from .norm import AbsorbedReLU, BatchLastBatchNorm2d, BatchLastBatchNormReLU2d
from .packed import PackedWeight
from .pool import BatchLastAdaptiveAvgPool2d, BatchLastAvgPool2d, BatchLastMaxPool2d
from .report import LayerRow, Report
from .storing import check_float32, short_name, tell_activation_dtype
from .trace import copy_memo

__all__ = ["densify_", "sparsify", "sparsify_"]

Model = TypeVar("Model", bound=nn.Module)
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
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    **{ours: theirs for theirs, ours in _BATCH_LAST.items()},
    BatchLastBatchNormReLU2d: nn.BatchNorm2d,
    BatchLastGroupNormReLU: nn.GroupNorm,
    DeferrableBatchNorm2d: nn.BatchNorm2d,
    AbsorbedReLU: nn.ReLU,
}
_WITH_RELU: dict[type[nn.Module], type[nn.Module]] = {
    BatchLastBatchNorm2d: BatchLastBatchNormReLU2d,
    BatchLastGroupNorm: BatchLastGroupNormReLU,
}
_KIND: dict[type[nn.Module], Literal["conv2d", "linear"]] = {
    nn.Conv2d: "conv2d",
    BatchLastConv2d: "conv2d",
    SparseConv2d: "conv2d",
    MaskedConv2d: "conv2d",
    nn.Linear: "linear",
    SparseLinear: "linear",
    MaskedLinear: "linear",
}


@dataclass
class _Layer:
    """A module that gets a mask."""

    name: str
    module: nn.Module
    plan: Plan
    choice: KernelChoice


def sparsify_(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    fuse: bool = True,
    filter_fn: Filter | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Report:
    """Makes a model compute with the weights that masks keep, in place.

    Each masked `nn.Conv2d` and `nn.Linear` becomes a :class:`SparseConv2d` or :class:`SparseLinear`, or,
    where the dense kernel is faster (:func:`fedpai_kernels.nn.choose_kernel`, by figures that come with the package
    or that :func:`fedpai_kernels.tune` measured on this machine), a :class:`MaskedConv2d` or
    :class:`MaskedLinear`; all of them train `values`, the packed weights. If any convolution is sparse,
    norms, pooling and the remaining convolutions become their batch-last forms, so that activations keep one
    layout from end to end. Weights outside of a mask are dropped. Make the optimiser afterwards: the
    parameters are new objects.

    Args:
        model: any module; layers may be used more than once and share parameters.
        masks: {module name: mask}, bool (or exactly 0 and 1) tensors of the weights' shapes; a layer that is
            not named stays dense. A layer that is sparse already gets its new mask, with zeros where it had
            no weight. Without `masks`, a layer's mask is the one that `torch.nn.utils.prune` gave it (whose
            hooks and buffers are then removed), else the exact zeros of its weight; layers that are sparse
            already stay as they are.
        fuse: computes a batch norm, the sum that alone reads it (``norm(x) + shortcut``) and the activation
            (ReLU, ReLU6, LeakyReLU, SiLU, GELU) that alone reads either in one pass, or, where a sparse
            convolution alone reads the norm or its activation, while that loads its input: the normalised
            activation is then neither stored nor kept. Likewise a group norm and the ReLU, a module, that alone
            reads it. Where that is so is proven by tracing the model with `torch.fx` (:func:`find_fusions`); the
            report names every norm that stays by itself, and why. The modules' forwards run as they are; under
            hooks on the norm, its activation or that convolution the steps are separate.
        filter_fn: called as ``filter_fn(module, name)``; a module for which it returns False is left as it
        is.
        activation_dtype: `torch.bfloat16` keeps what the converted layers need for the backward pass rounded: half
            the memory, float32 arithmetic, gradients with errors of about 2^-9 (docs/numerics.md). None keeps it as
            it is, also in layers that an earlier call told otherwise. An attribute of that name on each module
            says so.

    Returns:
        One row per convolution and linear layer: its density, its kernel, and why.

    Raises:
        TypeError: a mask that is no tensor, or one for a module that is no plain Conv2d or Linear; an
            `activation_dtype` for a model with float64 layers.
        ValueError: a mask for a missing module (with the nearest name), of another shape, with entries other
            than 0 and 1 (NaN, infinity), or that keeps nothing; no masks at all; a parameter shared by layers
            of different masks; an `activation_dtype` other than bfloat16; FEDPAI_TUNING names a file that cannot be
            used. The model is unchanged then.
    """
    wanted = filter_fn if filter_fn is not None else _everything
    figures = break_evens()
    layers = _planned(model, masks, wanted, figures)
    names = dict(_named(model))
    batch_last = any(
        type(module) is SparseConv2d and module not in {layer.module for layer in layers}
        for module in names.values()
    ) or any(layer.choice.kernel == "sparse" and layer.plan.kind == "conv2d" for layer in layers)
    groups = _shared_parameters(model, layers)
    check_float32(names, wanted, activation_dtype)
    fusions = find_fusions(model, _sparse_convs(names, layers)) if fuse and batch_last else Fusions()

    for group in groups:
        _convert(group)
    notes = _surround(names, wanted, fusions, figures) if batch_last else []
    notes += tell_activation_dtype(names, wanted, activation_dtype)
    trim_heap()  # what the dense weights took
    return Report(_rows(names, {id(layer.module): layer for layer in layers}, wanted), notes)


def sparsify(
    model: Model,
    masks: Mapping[str, Tensor] | None = None,
    *,
    fuse: bool = True,
    filter_fn: Filter | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Model:
    """A converted copy of `model`; as :func:`sparsify_` otherwise. Its report is that of ``sparsify_(copy,
    ...)``.
    """
    copied = copy.deepcopy(model, copy_memo(model))
    sparsify_(copied, masks, fuse=fuse, filter_fn=filter_fn, activation_dtype=activation_dtype)
    return copied


def densify_(model: Model) -> Model:
    """Turns every module of this package in `model` back into torch's own, in place, and returns `model`.

    Weights are bit-equal, with exact zeros outside of the masks. Make the optimiser afterwards.
    """
    weights: dict[int, nn.Parameter] = {}  # by the id of the packed parameter, for layers that share one
    for module in list(model.modules()):
        detach(module)
        if isinstance(module, PackedWeight):
            shared, key = weights.get(id(module.values)), id(module.values)
            weights[key] = module.retype_dense(shared)._parameters["weight"]  # type: ignore[assignment]
        elif type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            for added in ("full_fan_in", "activation_dtype"):  # by the conversion
                module.__dict__.pop(added, None)
    return model


# ---- checks, before anything is touched
# -------------------------------------------------------------------------


def _everything(module: nn.Module, name: str) -> bool:
    return True


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under its first name."""
    return list(model.named_modules())


def _planned(
    model: nn.Module, masks: Mapping[str, Tensor] | None, wanted: Filter, figures: BreakEvens
) -> list[_Layer]:
    found = _given(model, masks) if masks is not None else _carried(model)
    layers = []
    for name, module, mask in found:
        if not wanted(module, name):
            continue
        weight, groups = _weight(module), int(getattr(module, "groups", 1))
        plan = Plan.from_mask(mask, groups=groups)
        layers.append(_Layer(name, module, plan, _choice(module, plan, weight, figures)))
    if not layers and masks is None and not any(isinstance(m, PackedWeight) for m in model.modules()):
        raise ValueError(
            "masks: none given, and no layer carries one (torch.nn.utils.prune, or exact zeros in a weight)"
        )
    return layers


def _given(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[str, nn.Module, Tensor]]:
    aliases = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, tuple[str, nn.Module, Tensor]] = {}
    for name, mask in masks.items():
        module = aliases.get(name)
        if module is None:
            near = difflib.get_close_matches(
                str(name), [n for n, m in aliases.items() if type(m) in _KIND], 1, 0.3
            )
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise ValueError(f"masks: the model has no module {name!r}{hint}")
        if type(module) not in _KIND:
            raise TypeError(
                f"masks[{name!r}]: only nn.Conv2d and nn.Linear take a mask, but the module is "
                f"{type(module).__name__}"
            )
        if (
            not isinstance(module, PackedWeight)
            and not is_pruned(module)
            and "weight" not in module._parameters
        ):
            raise TypeError(
                f"masks[{name!r}]: the module computes its weight (a reparametrisation such as weight_norm); "
                "remove that first"
            )
        checked = checked_mask(mask, _weight(module).shape, f"masks[{name!r}]")
        before = found.get(id(module))
        if before is not None and not torch.equal(before[2].cpu(), checked.cpu()):
            raise ValueError(f"masks: {before[0]!r} and {name!r} are one module, but their masks differ")
        found.setdefault(id(module), (name, module, checked))
    return list(found.values())


def _carried(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    found = []
    for name, module in _named(model):
        if type(module) not in _KIND or isinstance(module, PackedWeight):
            continue
        mask = mask_of(module)
        if mask is not None:
            found.append((name, module, checked_mask(mask, mask.shape, f"the mask of {name!r}")))
    return found


def _weight(module: nn.Module) -> Tensor:
    return module.weight if isinstance(module, PackedWeight) else unpruned_weight(module)


def _choice(module: nn.Module, plan: Plan, weight: Tensor, figures: BreakEvens) -> KernelChoice:
    if weight.dtype not in (torch.float32, torch.float64):
        return KernelChoice("dense", f"no sparse kernel for {weight.dtype}")
    if weight.device.type != "cpu":
        return KernelChoice("dense", f"no sparse kernel for device {weight.device.type}")
    stride = getattr(module, "stride", (1, 1))
    return choose_kernel(LayerInfo(plan.kind, plan.mask_shape, plan.nnz, plan.groups, stride), figures)


def _shared_parameters(model: nn.Module, layers: list[_Layer]) -> list[list[_Layer]]:
    """The layers, grouped by the weight parameter they share.

    Raises:
        ValueError: a masked weight is also the parameter of a layer with another mask or with none.
    """
    owner = {id(layer.module): layer for layer in layers}
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in _named(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, module))
    groups: dict[int, list[_Layer]] = {}
    for layer in layers:
        parameters = layer.module._parameters
        key = next(
            id(parameters[k]) for k in ("values", "weight_orig", "weight") if parameters.get(k) is not None
        )
        for name, module in holders[key]:
            other = owner.get(id(module))
            if other is None or other.plan != layer.plan:
                raise ValueError(
                    f"masks: {layer.name!r} and {name!r} share one weight, so they need the same mask"
                )
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _sparse_convs(names: dict[str, nn.Module], layers: list[_Layer]) -> list[nn.Module]:
    """The convolutions that will be sparse."""
    planned = {id(layer.module): layer for layer in layers}
    convs: list[nn.Module] = []
    for module in names.values():
        layer = planned.get(id(module))
        if layer is None:
            if type(module) is SparseConv2d:
                convs.append(module)
        elif layer.plan.kind == "conv2d" and layer.choice.kernel == "sparse":
            convs.append(module)
    return convs


# ---- changes
# ----------------------------------------------------------------------------------------------------


def _convert(group: list[_Layer]) -> None:
    """Converts layers that share one weight; they share `values` then."""
    values: nn.Parameter | None = None
    for layer in group:
        module = layer.module
        if isinstance(module, PackedWeight):
            module = module.retype_dense()
        elif is_pruned(module):
            remove_pruning(module)
        module.__class__ = nn.Conv2d if layer.plan.kind == "conv2d" else nn.Linear
        sparse = layer.choice.kernel == "sparse"
        if layer.plan.kind == "conv2d":
            target: type[PackedWeight] = SparseConv2d if sparse else MaskedConv2d
        else:
            target = SparseLinear if sparse else MaskedLinear
        values = target.retype(module, layer.plan, values).values


def _surround(
    names: dict[str, nn.Module], wanted: Filter, fusions: Fusions, figures: BreakEvens
) -> list[str]:
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

    for norm, relu in fusions.pairs:
        if may("the ReLU", norm, relu):
            norm.__class__, relu.__class__ = _WITH_RELU[type(norm)], AbsorbedReLU
    for owner, site in fusions.sites:
        if may(site.what, *site.computed(owner)):
            attach(owner, site)
    notes += [f"fused: {n} {title} after them" for title, n in fused.items()]
    if fusions.untraced:
        return [*notes, f"norms not fused: {fusions.untraced}"]
    if alone:
        notes.append("not fused: " + ", ".join(f"{name} ({reason})" for name, reason in alone.items()))
    return notes


def _rows(names: dict[str, nn.Module], planned: dict[int, _Layer], wanted: Filter) -> list[LayerRow]:
    rows = []
    for name, module in names.items():
        kind = _KIND.get(type(module))
        layer = planned.get(id(module))
        keeps = short_name(getattr(module, "activation_dtype", None))
        if kind is None:
            continue
        if layer is not None:
            plan, choice = layer.plan, layer.choice
            rows.append(LayerRow(name, kind, plan.mask_shape, plan.nnz, plan.density, *choice, keeps))
        elif isinstance(module, PackedWeight):
            plan = module.plan
            kernel = "sparse" if isinstance(module, (SparseConv2d, SparseLinear)) else "dense"
            rows.append(LayerRow(name, kind, plan.mask_shape, plan.nnz, plan.density, kernel, "as it was", keeps))
        elif "weight" in module._parameters or is_pruned(module):
            weight = unpruned_weight(module)
            reason = "no mask" if wanted(module, name) else "left out by filter_fn"
            rows.append(LayerRow(name, kind, tuple(weight.shape), weight.numel(), 1.0, "dense", reason, keeps))
    return rows
