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
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..memory import trim_heap
from ..plan import Plan
from ..structure import Structure, describe
from ..tuning import BreakEvens, break_evens
from .choice import KernelChoice, LayerInfo, choose_kernel
from .compact import Cuts, find_cuts, may_cut
from .conv2d import BatchLastConv2d, MaskedConv2d, SparseConv2d
from .deferred import detach
from .fuse import Fusions, find_fusions
from .linear import MaskedLinear, SparseLinear
from .masks import check_structure, checked_mask, is_pruned, mask_of, remove_pruning, unpruned_weight
from .packed import PackedWeight
from .removed import Cut, Restored, original_mask, original_shape, restore_, shrink_
from .report import LayerRow, Report, directions_of
from .storing import check_float32, short_name, tell_activation_dtype
from .surround import PLAIN, refuse_parametrised, surround_
from .trace import copy_memo, trace_modes

__all__ = ["densify_", "report", "sparsify", "sparsify_"]

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

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
    mask: Tensor  # of the original shape
    cut: Cut | None
    plan: Plan
    choice: KernelChoice


def sparsify_(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    structure: str | Structure = "auto",
    fuse: bool = True,
    compact: bool | None = None,
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
        structure: what all masks must be, such as ``"16x1"`` (:mod:`fedpai_kernels.structure`); layers smaller than a
            block are cut at their edges. ``"auto"`` finds each mask's own; declaring it changes no kernel.
        fuse: computes a batch norm, the sum that alone reads it (``norm(x) + shortcut``) and the activation
            (ReLU, ReLU6, LeakyReLU, SiLU, GELU) that alone reads either in one pass, or, where a sparse
            convolution alone reads the norm or its activation, while that loads its input: the normalised
            activation is then neither stored nor kept. Likewise a group norm and the ReLU that alone reads it.
            Where that is so is proven by tracing the model with `torch.fx` (:func:`find_fusions`); the
            report names every norm that stays by itself, and why. The modules' forwards run as they are; under
            hooks on the norm, its activation or that convolution the steps are separate.
        compact: True first removes the channels that the masks leave without use, through layers, norms, residual sums
            and the classifier (:mod:`fedpai_kernels.nn.compact`, docs/compaction.md). Parameters, buffers and `.mask`
            are those of the smaller layers then. State dicts, and masks for a later call, keep the original shapes;
            :func:`densify_` gives everything back. None does so where all masks keep or drop whole channels.
        filter_fn: called as ``filter_fn(module, name)``; a module for which it returns False is left as it
        is.
        activation_dtype: `torch.bfloat16` keeps what the converted layers need for the backward pass rounded: half
            the memory, float32 arithmetic, gradients with errors of about 2^-9 (docs/numerics.md). None keeps it as
            it is, also in layers that an earlier call told otherwise. An attribute of that name on each module
            says so.

    Returns:
        One row per convolution and linear layer: its density, its kernel on the CPU, and why (see :func:`report`).

    Raises:
        TypeError: a mask that is no tensor, or one for a module that is no plain Conv2d or Linear; an
            `activation_dtype` for a model with float64 layers.
        ValueError: a mask for a missing module (with the nearest name), of another shape, with entries other
            than 0 and 1 (NaN, infinity), that keeps nothing, or that is not of the declared `structure`; no masks
            at all; where channels are removed, masks
            that leave no path from the input to the output (with the layer where it breaks off); a parameter shared
            by layers of different masks; an `activation_dtype` other than bfloat16; FEDPAI_TUNING names a file that
            cannot be used. The model is unchanged then.
    """
    wanted = filter_fn if filter_fn is not None else _everything
    figures = break_evens()
    names = dict(_named(model))
    with Restored(model) as restored:
        found = _masks_of(model, masks, wanted)
        check_structure(found, structure)
        every: dict[nn.Module, Tensor] = {m: m.mask for m in names.values() if isinstance(m, PackedWeight)}
        every.update({module: mask for _, module, mask in found})
        cutting = _whole_channels(every) if compact is None else compact
        traces = trace_modes(model) if cutting and may_cut(every) else None
        cuts = find_cuts(model, every, wanted, traces) if traces is not None else Cuts()
        layers = [_planned(*layer, cuts.of.get(layer[1]), figures) for layer in found]
        batch_last = any(
            type(module) is SparseConv2d and module not in {layer.module for layer in layers}
            for module in names.values()
        ) or any(layer.choice.kernel == "sparse" and layer.plan.kind == "conv2d" for layer in layers)
        groups = _shared_parameters(model, layers)
        check_float32(names, wanted, activation_dtype)
        convs = _sparse_convs(names, layers)
        fusions = find_fusions(model, convs, traces) if fuse and batch_last else Fusions()

    for group in groups:
        _convert(group)
    for module in cuts.of.keys() - {layer.module for layer in layers}:
        if not restored.take_back(module, cuts.of[module]):
            shrink_(module, cuts.of[module])
    notes = cuts.notes
    notes += surround_(names, wanted, fusions, figures) if batch_last else []
    notes += tell_activation_dtype(names, wanted, activation_dtype)
    trim_heap()  # what the dense weights took
    return Report(_rows(names, {id(layer.module): layer for layer in layers}, wanted), notes)


def sparsify(
    model: Model,
    masks: Mapping[str, Tensor] | None = None,
    *,
    structure: str | Structure = "auto",
    fuse: bool = True,
    compact: bool | None = None,
    filter_fn: Filter | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Model:
    """A converted copy of `model`; as :func:`sparsify_` otherwise. Its report is that of ``sparsify_(copy,
    ...)``.
    """
    copied = copy.deepcopy(model, copy_memo(model))
    sparsify_(
        copied,
        masks,
        structure=structure,
        fuse=fuse,
        compact=compact,
        filter_fn=filter_fn,
        activation_dtype=activation_dtype,
    )
    return copied


def report(model: nn.Module) -> Report:
    """The rows of :func:`sparsify_` for a model as it is, and what was measured and chosen on CUDA devices so far."""
    return Report(_rows(dict(_named(model)), {}, _everything))


def densify_(model: Model) -> Model:
    """Turns every module of this package in `model` back into torch's own, in place, and returns `model`.

    Weights are bit-equal, with exact zeros outside of the masks; removed channels are back with what they had. Make
    the optimiser afterwards.

    Raises:
        TypeError: one of these modules is parametrised (`torch.nn.utils.parametrize`); nothing is touched then.
    """
    refuse_parametrised(_named(model))
    weights: dict[int, nn.Parameter] = {}  # by the id of the packed parameter, for layers that share one
    for module in list(model.modules()):
        detach(module)
        if isinstance(module, PackedWeight):
            shared, key = weights.get(id(module.values)), id(module.values)
            weights[key] = module.retype_dense(shared)._parameters["weight"]  # type: ignore[assignment]
        elif type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
            for added in ("full_fan_in", "activation_dtype"):  # by the conversion
                module.__dict__.pop(added, None)
        restore_(module)
    return model


# ---- checks, before anything is touched -----------------------------------------------------------------------------


def _whole_channels(masks: Mapping[nn.Module, Tensor]) -> bool:
    """Whether all masks keep or drop whole channels."""
    return all(
        describe(mask, int(getattr(module, "groups", 1))) in ("channel", "dense")
        for module, mask in masks.items()
    )


def _everything(module: nn.Module, name: str) -> bool:
    return True


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under its first name."""
    return list(model.named_modules())


def _masks_of(
    model: nn.Module, masks: Mapping[str, Tensor] | None, wanted: Filter
) -> list[tuple[str, nn.Module, Tensor]]:
    """The layers that get a mask: name, module, mask."""
    every = _given(model, masks) if masks is not None else _carried(model)
    found = [(name, module, mask) for name, module, mask in every if wanted(module, name)]
    if not found and masks is None and not any(isinstance(m, PackedWeight) for m in model.modules()):
        raise ValueError(
            "masks: none given, and no layer carries one (torch.nn.utils.prune, or exact zeros in a weight)"
        )
    return found


def _planned(name: str, module: nn.Module, mask: Tensor, cut: Cut | None, figures: BreakEvens) -> _Layer:
    kept = mask if cut is None else cut.of_weight(mask)
    groups = int(getattr(module, "groups", 1))
    plan = Plan.from_mask(kept, groups=groups if cut is None or groups == 1 else len(kept))
    return _Layer(name, module, mask, cut, plan, _choice(module, plan, _weight(module), figures))


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
    if weight.device.type not in ("cpu", "cuda"):
        return KernelChoice("dense", f"no sparse kernel for device {weight.device.type}")
    if weight.device.type == "cuda" and weight.dtype != torch.float32:
        return KernelChoice("dense", f"no sparse kernel for {weight.dtype} on a CUDA device")
    stride = getattr(module, "stride", (1, 1))
    return choose_kernel(
        LayerInfo(plan.kind, plan.mask_shape, plan.nnz, plan.groups, stride, plan.shared), figures
    )


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


# ---- changes --------------------------------------------------------------------------------------------------------


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
        if layer.cut is not None:
            shrink_(module, layer.cut, layer.mask)
        sparse = layer.choice.kernel == "sparse"
        if layer.plan.kind == "conv2d":
            target: type[PackedWeight] = SparseConv2d if sparse else MaskedConv2d
        else:
            target = SparseLinear if sparse else MaskedLinear
        values = target.retype(module, layer.plan, values).values


def _rows(names: dict[str, nn.Module], planned: dict[int, _Layer], wanted: Filter) -> list[LayerRow]:
    rows = []
    for name, module in names.items():
        kind = _KIND.get(type(module))
        layer = planned.get(id(module))
        keeps = short_name(getattr(module, "activation_dtype", None))
        if kind is None:
            continue
        if layer is not None:
            rows.append(LayerRow.of_plan(name, layer.plan, *layer.choice, keeps, original_mask(module)))
        elif isinstance(module, PackedWeight):
            kernel = "sparse" if isinstance(module, (SparseConv2d, SparseLinear)) else "dense"
            row = LayerRow.of_plan(name, module.plan, kernel, "as it was", keeps, original_mask(module))
            rows.append(replace(row, directions=directions_of(module)))
        elif "weight" in module._parameters or is_pruned(module):
            weight, before = unpruned_weight(module), original_shape(module)
            reason = "no mask" if wanted(module, name) else "left out by filter_fn"
            shape, nnz = tuple(weight.shape), weight.numel()
            rows.append(LayerRow(name, kind, shape, nnz, 1.0, "dense", "dense", reason, keeps, before))
    return rows
