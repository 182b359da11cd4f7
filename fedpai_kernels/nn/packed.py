# SPDX-License-Identifier: Apache-2.0
"""What sparse and masked layers share: one packed parameter, and a dense face towards checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..plan import Plan
from .masks import is_pruned, plan_for, remove_pruning, unpruned_weight
from .removed import TensorCut, cut_of, restore_

__all__ = ["PackedWeight"]

Self = TypeVar("Self", bound="PackedWeight")


class PackedWeight(nn.Module):
    """A layer whose only trainable weights are those that a mask keeps.

    Attributes:
        values: (nnz,) parameter, the surviving weights in row-major order of the mask.
        bias: as in the dense layer; None without.
        plan: the mask, compiled; shared by all copies of the module.

    `state_dict` holds a dense `weight` (zeros outside of the mask) in place of `values`, and so loads into
    the dense layer and back. Loading a weight that is not zero outside of the mask is an error. Unlike the
    dense layer's, the tensor in a state dict is a copy.

    `values` takes no parametrisation: `torch.nn.utils.parametrize` keeps those by name in a ModuleDict, which has a
    method of that name, and ends in a KeyError.

    Where the conversion removed channels (:mod:`fedpai_kernels.nn.compact`), `values`, `bias`, `plan`, `weight` and
    `mask` are those of the smaller layer; the state dict and :meth:`to_dense` have the original shapes.
    """

    dense_type: ClassVar[type[nn.Module]]

    values: nn.Parameter
    bias: nn.Parameter | None
    plan: Plan

    # ---- to and from the dense layer
    # --------------------------------------------------------------------------

    @classmethod
    def from_dense(cls: type[Self], module: nn.Module, mask: Tensor | Plan | None = None) -> Self:
        """A new layer with the weights of a dense `module` that the mask keeps. `module` is left as it is.

        Args:
            module: a layer of `dense_type`.
            mask: bool tensor of the weight's shape, or a plan. Without it, the mask of
                `torch.nn.utils.prune`, else the weight's exact zeros.

        Raises:
            TypeError: a module or mask of another type, or a module that computes by a `forward` of its own.
            ValueError: a mask of another shape, or that keeps nothing.
        """
        if not isinstance(module, cls.dense_type):
            raise TypeError(
                f"{cls.__name__}.from_dense: module: expected {cls.dense_type.__name__}, "
                f"got {type(module).__name__}"
            )
        own = _own_method(module)
        if own:
            raise TypeError(
                f"{cls.__name__}.from_dense: module: {type(module).__name__} computes by a {own} of its own, which "
                f"{cls.__name__} would not call; expected the computation of {cls.dense_type.__name__}"
            )
        plan = plan_for(module, mask)
        copied = _independent_copy(module)
        if is_pruned(copied):
            remove_pruning(copied)
        return cls.retype(copied, plan)

    @classmethod
    def retype(cls: type[Self], module: nn.Module, plan: Plan, values: nn.Parameter | None = None) -> Self:
        """Turns a dense layer into this kind, in place: the object, its hooks, attributes and bias stay the
        same.

        `values` is a parameter to share; without it, the weight is packed.
        """
        dense = module._parameters.pop("weight")
        assert dense is not None  # the callers have checked
        if values is None:
            values = nn.Parameter(plan.pack(dense.detach()), requires_grad=dense.requires_grad)
        rest = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({"values": values, **rest})
        module.__dict__["plan"] = plan
        module.__class__ = cls
        assert isinstance(module, cls)
        return module

    def retype_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """Turns this layer into the dense one, in place. `weight` is a parameter to share."""
        module: nn.Module = self
        if weight is None:
            weight = nn.Parameter(self.weight.detach(), requires_grad=self.values.requires_grad)
        rest = {name: p for name, p in module._parameters.items() if name != "values"}
        module._parameters.clear()
        module._parameters.update({"weight": weight, **rest})
        for name in ("plan", "batch_last", "activation_dtype"):  # what the conversion added
            module.__dict__.pop(name, None)
        module.__class__ = self.dense_type
        return module

    def to_dense(self) -> nn.Module:
        """A new dense layer with the same weights, exact zeros outside of the mask."""
        dense: nn.Module = _independent_copy(self).retype_dense()
        restore_(dense)
        return dense

    # ---- the dense face
    # ---------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The dense weight, made from `values`: differentiable, and for reading only. See
        :meth:`set_weight_`.
        """
        return self.plan.unpack(self.values)

    @property
    def mask(self) -> Tensor:
        """Dense bool tensor of the weight's shape, True where a weight survives."""
        return self.plan.mask().to(self.values.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "mask"):
            raise AttributeError(
                f"{type(self).__name__}.{name} is computed and cannot be assigned; use set_weight_(tensor) "
                "or load_state_dict to change the weights within the mask, fedpai_kernels.sparsify_ to change "
                "the mask"
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Copies a dense weight into `values`.

        Raises:
            ValueError: another shape, or a weight that is not zero outside of the mask.
        """
        problem = self._misfit(weight)
        if problem:
            raise ValueError(f"weight: {problem}")
        self.values.copy_(self.plan.pack(weight))

    def reset_parameters(self) -> None:
        """Draws new weights and bias as the dense layer does, and keeps those within the mask."""
        removed = cut_of(self, "weight")
        shape = self.plan.mask_shape if removed is None else removed.shape
        weight = torch.empty(shape, dtype=self.values.dtype, device=self.values.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        with torch.no_grad():
            self.values.copy_(self.plan.pack(weight if removed is None else removed.load(weight)))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def _misfit(self, weight: Tensor, removed: TensorCut | None = None) -> str:
        """What is wrong with a dense weight for this layer, as it was before channels were `removed`; empty if nothing
        is."""
        shape = self.plan.mask_shape if removed is None else removed.shape
        if tuple(weight.shape) != shape:
            return f"expected shape {shape}, got {tuple(weight.shape)}"
        weight = weight.detach()
        outside = int(torch.count_nonzero(weight).item())
        if removed is not None:
            outside -= int(torch.count_nonzero(removed.outside(weight)).item())
            weight = removed.inside(weight)
        outside -= int(torch.count_nonzero(self.plan.pack(weight)).item())
        if outside:
            return f"{outside} of its entries outside of the mask are not zero: a checkpoint of another mask"
        return ""

    # ---- state dict
    # -------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        for key, tensor in own.items():
            if key == prefix + "values":
                destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
            else:
                destination[key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if own.pop(prefix + "values", None) is not None and strict:
            unexpected_keys.append(prefix + "values")
        packed: Tensor = self.values  # loading a parameter into itself changes nothing
        weight = own.pop(prefix + "weight", None)
        if weight is None:
            if strict:
                missing_keys.append(prefix + "weight")
        elif problem := self._misfit(weight, removed := cut_of(self, "weight")):
            error_msgs.append(f"{prefix}weight: {problem}")
        else:
            packed = self.plan.pack(weight if removed is None else removed.load(weight))
        own[prefix + "values"] = packed
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _own_method(module: nn.Module) -> str:
    """The method by which a layer computes something else than torch's layer does; "" where there is none."""
    for name in ("forward", "_conv_forward"):
        method = getattr(type(module), name, None)
        known = method is None or str(method.__module__).startswith(("torch.nn.", "fedpai_kernels."))
        if name in vars(module) or not known:
            return name
    return ""


def _independent_copy(module: nn.Module) -> Any:
    """A copy with tensors of its own, that shares the values of all other attributes."""
    copied = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        # The registries of parameters, buffers and hooks; sharing them would tie the modules together.
        copied.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    if "_removed" in copied.__dict__:
        copied.__dict__["_removed"] = copy.deepcopy(copied.__dict__["_removed"])
    for name, parameter in copied._parameters.items():
        if parameter is not None:
            copied._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for name, buffer in copied._buffers.items():
        if buffer is not None:
            copied._buffers[name] = buffer.detach().clone()
    for key, hook in list(copied._load_state_dict_pre_hooks.items()):
        if getattr(hook, "with_module", False):  # bound to its module
            rebound: Any = type(hook)
            copied._load_state_dict_pre_hooks[key] = rebound(getattr(hook, "hook"), copied)  # noqa: B009
    if is_pruned(copied):
        copied.__dict__["weight"] = unpruned_weight(copied)
    return copied


def match_autocast(x: Tensor, values: Tensor) -> Tensor:
    """Under autocast the sparse kernels compute in the weights' own precision; on a CUDA device they take bfloat16
    images with float32 values, so there autocast to bfloat16 is what it says."""
    kind = x.device.type
    if kind == "cuda" and values.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.bfloat16 if torch.get_autocast_dtype(kind) == torch.bfloat16 else torch.float32)
    if x.dtype != values.dtype and torch.is_autocast_enabled(kind):
        return x.to(values.dtype)
    return x


def is_dispatched(x: Tensor, values: Tensor) -> bool:
    """Whether a layer with these operands is computed on a CUDA device by what is fastest there
    (:mod:`fedpai_kernels.dispatch`): then a masked layer is no other than a sparse one."""
    if x.device.type != "cuda" or values.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda") == torch.bfloat16
    return x.dtype in (torch.float32, torch.bfloat16)
