# SPDX-License-Identifier: Apache-2.0
"""A module without some of its channels, and what was taken from it: for its state dict, and for the way back.

:func:`shrink_` makes the parameters and buffers of a layer or norm smaller, in place, and leaves a :class:`Removed` on
it. The module's `state_dict` goes on to have, and to take, tensors of the original shapes; hooks on the module see to
that, whatever class the conversion gives it. :func:`restore_` undoes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan

__all__ = [
    "Cut",
    "Removed",
    "Restored",
    "TensorCut",
    "cut_of",
    "original_mask",
    "original_shape",
    "parts_of",
    "restore_",
    "shrink_",
]


@dataclass(frozen=True)
class Cut:
    """The channels of a module that stay: int64 indexes, ascending. None: all of them.

    Attributes:
        outputs: of a layer; of a norm and a depthwise convolution, whose inputs are the same channels.
        inputs: of a layer; None for the others.
    """

    outputs: Tensor | None
    inputs: Tensor | None = None

    def is_same(self, other: Cut) -> bool:
        pairs = (self.outputs, other.outputs), (self.inputs, other.inputs)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def of_weight(self, weight: Tensor) -> Tensor:
        """What stays of a weight or of its mask."""
        if self.outputs is not None:
            weight = weight.index_select(0, self.outputs.to(weight.device))
        if self.inputs is not None:
            weight = weight.index_select(1, self.inputs.to(weight.device))
        return weight


@dataclass
class TensorCut:
    """One tensor of a module.

    Attributes:
        shape: the original one.
        cut: what stays.
        positions: int64, in the flattened original: the elements that were set aside. Outside of these and of what
            stays, the original is zero.
        values: those elements.
    """

    shape: tuple[int, ...]
    cut: Cut
    positions: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor, cut: Cut, mask: Tensor | None = None) -> TensorCut:
        """Sets aside what the cut takes of a tensor; with a mask (bool, of its shape), of what that keeps."""
        aside = torch.ones(tensor.shape, dtype=torch.bool) if mask is None else mask.detach().cpu().clone()
        aside.reshape(-1)[_held(tuple(tensor.shape), cut)] = False
        positions = aside.reshape(-1).nonzero().squeeze(1)
        made = cls(tuple(tensor.shape), cut, positions, tensor.new_empty(0))
        made.values = made.outside(tensor.detach())
        return made

    def inside(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the original shape: what stays."""
        return self.cut.of_weight(tensor)

    def outside(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the original shape: what is set aside."""
        return tensor.reshape(-1)[self.positions.to(tensor.device)]

    def load(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the original shape: takes over what is set aside, returns what stays."""
        self.values.copy_(self.outside(tensor.detach()))
        return self.inside(tensor)

    def whole(self, tensor: Tensor, aside: Tensor | None = None) -> Tensor:
        """The tensor of the original shape, from what stays of it and what was set aside; differentiable."""
        aside = (self.values if aside is None else aside).to(tensor)
        flat = torch.zeros(math.prod(self.shape), dtype=tensor.dtype, device=tensor.device)
        flat = flat.index_copy(0, self.held().to(tensor.device), tensor.reshape(-1))
        return flat.index_copy(0, self.positions.to(tensor.device), aside).reshape(self.shape)

    def held(self) -> Tensor:
        """Positions, in the flattened original, of what stays."""
        return _held(self.shape, self.cut)


def _held(shape: tuple[int, ...], cut: Cut) -> Tensor:
    return cut.of_weight(torch.arange(math.prod(shape)).reshape(shape)).reshape(-1)


@dataclass
class Removed:
    """What :func:`shrink_` took from a module.

    Attributes:
        cut: what stays.
        tensors: by their names in a state dict.
        sizes: the attributes that count channels, as they were.
    """

    cut: Cut
    tensors: dict[str, TensorCut] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")


def shrink_(module: nn.Module, cut: Cut, mask: Tensor | None = None) -> None:
    """Removes channels of a Conv2d, Linear, batch norm or instance norm, also of a packed layer, in place.

    Args:
        module: with its original shapes. Its parameters and buffers are new objects afterwards.
        cut: what stays.
        mask: of a dense layer that is about to be packed: the weights outside of it are dropped, not set aside.
    """
    removed = Removed(cut, sizes={name: getattr(module, name) for name in _SIZES if hasattr(module, name)})
    packed = "values" in module._parameters
    if packed:
        plan: Plan = module.__dict__["plan"]
        mask, weight = plan.mask(), plan.unpack(_parameter(module, "values").detach())
        removed.tensors["weight"] = TensorCut.of(weight, cut, mask)
        _repack(module, cut.of_weight(mask), cut.of_weight(weight))
    for name, tensor in _dense_tensors(module):
        if name == "weight" and tensor.dim() > 1:
            removed.tensors[name] = TensorCut.of(tensor, cut, mask)
        elif cut.outputs is not None:
            removed.tensors[name] = TensorCut.of(tensor, Cut(cut.outputs))
        else:
            continue
        _put(module, name, removed.tensors[name].inside(tensor))
    for name in removed.sizes:
        kept = cut.inputs if name in ("in_channels", "in_features") else cut.outputs
        if name == "groups" and removed.sizes[name] == 1:
            continue
        if name == "in_channels" and removed.sizes["groups"] > 1:
            kept = cut.outputs
        if kept is not None:
            setattr(module, name, len(kept))
    module.__dict__["_removed"] = removed
    others = dict(module._state_dict_hooks)  # after ours, as they expect the original shapes
    module._state_dict_hooks.clear()
    module.register_state_dict_post_hook(_save)
    module._state_dict_hooks.update(others)
    module.register_load_state_dict_pre_hook(_load)


def restore_(module: nn.Module) -> None:
    """Gives a module back what :func:`shrink_` took; nothing for any other module."""
    removed = _removed(module)
    if removed is None:
        return
    for size_name, size in removed.sizes.items():
        setattr(module, size_name, size)
    for name, tensor_cut in removed.tensors.items():
        if name == "weight" and "values" in module._parameters:
            plan: Plan = module.__dict__["plan"]
            weight = tensor_cut.whole(plan.unpack(_parameter(module, "values").detach()))
            _repack(module, _whole_mask(module, removed), weight)
        else:
            _put(module, name, tensor_cut.whole(dict(_dense_tensors(module))[name].detach()))
    del module.__dict__["_removed"]
    for hooks, ours in ((module._state_dict_hooks, _save), (module._load_state_dict_pre_hooks, _load)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
            del hooks[key]


class Restored:
    """Gives all modules of a model back what was taken from them; a context that takes it back where an error leaves
    it."""

    def __init__(self, model: nn.Module) -> None:
        self._before: dict[nn.Module, list[tuple[dict[Any, Any], dict[Any, Any]]]] = {}
        self._cuts: dict[nn.Module, Cut] = {}
        for module in model.modules():
            removed = _removed(module)
            if removed is None:
                continue
            hooks = module._state_dict_hooks, module._load_state_dict_pre_hooks
            registries = (module.__dict__, module._parameters, module._buffers, *hooks)
            self._before[module] = [(registry, dict(registry)) for registry in registries]
            self._cuts[module] = removed.cut
            restore_(module)

    def __enter__(self) -> Restored:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for module in self._before:
                self._undo(module)

    def take_back(self, module: nn.Module, cut: Cut) -> bool:
        """Makes a module what it was before, with the same parameters, if it had the same cut; whether that is so."""
        same = module in self._cuts and self._cuts[module].is_same(cut)
        if same:
            self._undo(module)
        return same

    def _undo(self, module: nn.Module) -> None:
        for registry, before in self._before[module]:
            registry.clear()
            registry.update(before)


def original_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Of the weight, before channels were removed; None where none were."""
    tensor_cut = cut_of(module, "weight")
    return None if tensor_cut is None else tensor_cut.shape


def original_mask(module: nn.Module) -> tuple[Tensor, int] | None:
    """The mask of a packed layer and its groups, before channels were removed; None where none were."""
    removed = _removed(module)
    return None if removed is None else (_whole_mask(module, removed), removed.sizes.get("groups", 1))


def cut_of(module: nn.Module, name: str) -> TensorCut | None:
    """What was taken from one tensor, by its name in the state dict."""
    removed = _removed(module)
    return None if removed is None else removed.tensors.get(name)


def parts_of(module: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    """The tensors that together hold a parameter or buffer of a converted model.

    Returns:
        (positions, tensor): int64 positions in the flattened original tensor, and the tensor with these elements, in
        that order; to read, and to write in place. The first is the parameter or buffer, the `values` of a packed layer
        for its "weight"; the second, where channels were removed, what was set aside.
    """
    tensor_cut = cut_of(module, name)
    packed = name == "weight" and "values" in module._parameters
    tensor = {**module._parameters, **module._buffers}["values" if packed else name]
    assert tensor is not None
    if tensor_cut is None:
        held = torch.arange(tensor.numel()) if not packed else module.__dict__["plan"].indices
        return [(held, tensor)]
    held = tensor_cut.held()
    if packed:
        held = held[module.__dict__["plan"].indices]
    return [(held, tensor), (tensor_cut.positions, tensor_cut.values)]


# ---- parts of a module
# ---------------------------------------------------------------------------------------------


def _removed(module: nn.Module) -> Removed | None:
    removed: Removed | None = module.__dict__.get("_removed")
    return removed


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _dense_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers with one element or more for each channel."""
    named = [*module._parameters.items(), *module._buffers.items()]
    return [(name, t) for name, t in named if t is not None and t.dim() > 0 and name != "values"]


def _whole_mask(module: nn.Module, removed: Removed) -> Tensor:
    plan: Plan = module.__dict__["plan"]
    tensor_cut = removed.tensors["weight"]
    return tensor_cut.whole(plan.mask(), torch.ones(len(tensor_cut.positions)))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A new tensor in place of a parameter or buffer."""
    parameter = module._parameters.get(name)
    if parameter is None:
        module._buffers[name] = tensor.detach()
    else:
        module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=parameter.requires_grad)


def _repack(module: nn.Module, mask: Tensor, weight: Tensor) -> None:
    """Another mask and weight for a packed layer."""
    depthwise = getattr(module, "groups", 1) > 1
    plan = Plan.from_mask(mask, groups=len(mask) if depthwise else 1)
    module.__dict__["plan"] = plan
    _put(module, "values", plan.pack(weight))


# ---- state dict
# ---------------------------------------------------------------------------------------------


def _save(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """State dict hook: the original shapes."""
    removed = _removed(module)
    for name, tensor_cut in removed.tensors.items() if removed else ():
        if prefix + name in state_dict:
            state_dict[prefix + name] = tensor_cut.whole(state_dict[prefix + name])


def _load(
    module: nn.Module,
    state_dict: Any,
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hook before loading: takes what was set aside, and leaves what stays. A packed weight, which the layer takes out
    before torch calls this, is not among the keys."""
    removed = _removed(module)
    for name, tensor_cut in removed.tensors.items() if removed else ():
        key = prefix + name
        if key not in state_dict:
            continue
        tensor = state_dict[key]
        if tuple(tensor.shape) != tensor_cut.shape:
            error_msgs.append(f"{key}: expected shape {tensor_cut.shape}, got {tuple(tensor.shape)}")
            state_dict[key] = dict(_dense_tensors(module))[name]  # loading a tensor into itself changes nothing
        else:
            state_dict[key] = tensor_cut.load(tensor)
