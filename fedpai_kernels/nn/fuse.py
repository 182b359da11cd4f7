# SPDX-License-Identifier: Apache-2.0
"""Finds batch norms whose only reader is a ReLU, by tracing the model with `torch.fx`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["copy_memo", "norm_relu_pairs"]


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own and this package's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fedpai_kernels.nn") or super().is_leaf_module(
            m, module_qualified_name
        )


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: copies of the tensors that modules hold as plain attributes.

    Those may be results of a computation (`torch.nn.utils.prune` keeps one), which `deepcopy` refuses.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def norm_relu_pairs(model: nn.Module) -> tuple[list[tuple[nn.Module, nn.Module]], str]:
    """Pairs (BatchNorm2d, ReLU) of `model` where nothing but the ReLU sees what the batch norm computes.

    A pair counts if, in training and in evaluation mode alike, each of the two is called once, the ReLU is
    the batch norm's only reader, and neither has hooks. The model is traced as a copy, without its hooks, and
    not changed.

    Returns:
        The pairs, and why there are none where the model cannot be traced (else an empty string).
    """
    by_name = dict(model.named_modules())
    if not any(type(m) is nn.BatchNorm2d for m in by_name.values()):
        return [], ""
    found: list[set[tuple[str, str]]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for training in (True, False):
                traced = copy.deepcopy(model, copy_memo(model)).train(training)
                for module in traced.modules():
                    _clear_hooks(module)
                found.append(_pairs_in(_Tracer().trace(traced), dict(traced.named_modules())))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        reason = str(error).strip().splitlines()
        return [], f"torch.fx cannot trace the model ({type(error).__name__}: {reason[0] if reason else ''})"
    pairs = [(by_name[norm], by_name[relu]) for norm, relu in sorted(found[0] & found[1])]
    return [pair for pair in pairs if not any(_has_hooks(m) for m in pair)], ""


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def _clear_hooks(module: nn.Module) -> None:
    for name in _HOOKS:
        getattr(module, name).clear()


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _pairs_in(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[tuple[str, str]]:
    calls: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(modules[str(node.target)]), []).append(node)
    pairs = set()
    for nodes in calls.values():
        norm = nodes[0]
        if type(modules[str(norm.target)]) is not nn.BatchNorm2d or len(nodes) != 1 or len(norm.users) != 1:
            continue
        (reader,) = norm.users
        if reader.op != "call_module" or reader.args != (norm,) or reader.kwargs:
            continue
        relu = modules[str(reader.target)]
        if type(relu) is nn.ReLU and len(calls[id(relu)]) == 1:
            pairs.add((str(norm.target), str(reader.target)))
    return pairs
