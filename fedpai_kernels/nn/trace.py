# SPDX-License-Identifier: Apache-2.0
"""Traces of a model by `torch.fx`, in training and in evaluation mode, for whoever must know what reads what."""

from __future__ import annotations

import copy
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .sites import surroundings

__all__ = ["Traces", "copy_memo", "trace_modes"]

# The modules whose forward was running, outermost first: path, and which call of all.
Calls = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Traces:
    """What :func:`trace_modes` found.

    Attributes:
        graphs: one for each mode. The meta data of a node hold "calls", the modules whose forward was running, and
            "surroundings" (:func:`fedpai_kernels.nn.sites.surroundings`).
        failure: why there are none, where the model cannot be traced; else empty.
    """

    graphs: tuple[fx.Graph, ...]
    failure: str = ""


def trace_modes(model: nn.Module) -> Traces:
    """Traces a copy of `model`, without its hooks, in training and in evaluation mode. The model is not changed.

    The traces look into every module but torch's own and this package's.
    """
    graphs = []
    try:
        with torch.random.fork_rng(devices=[]):
            for training in (True, False):
                traced = copy.deepcopy(model, copy_memo(model)).train(training)
                for module in traced.modules():
                    _clear_hooks(module)
                try:
                    graph = _Tracer().trace(traced)
                finally:
                    _drop_tensors(traced, model)
                for node in graph.nodes:
                    if node.op == "call_module":
                        model.get_submodule(str(node.target))  # a forward may put modules in
                graphs.append(graph)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        reason = str(error).strip().splitlines()
        failure = f"torch.fx cannot trace the model ({type(error).__name__}: {reason[0] if reason else ''})"
        return Traces((), failure)
    return Traces(tuple(graphs))


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


def _drop_tensors(traced: nn.Module, model: nn.Module) -> None:
    """Frees what the parameters and buffers of the traced copy hold, the size of the dense model.

    A trace is full of reference cycles, so the copy itself lives until some later garbage collection.
    """
    kept = {id(t) for t in itertools.chain(model.parameters(), model.buffers())}
    for t in itertools.chain(traced.parameters(), traced.buffers()):
        if id(t) not in kept and not is_lazy(t):  # a tensor may copy itself as itself
            t.data = t.data.new_empty(0)


class _Proxy(fx.Proxy):
    """torch.fx would take ``x += y`` for ``x = x + y``, but it changes x."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own and this package's; notes who called what, and in which surroundings."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Calls = (("", 0),)
        self._count = itertools.count(1)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fedpai_kernels.nn") or super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path, before = self.path_of_module(m), self._calls
        if not self.is_leaf_module(m, path):
            self._calls = (*before, (path, next(self._count)))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._calls = before

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["calls"], node.meta["surroundings"] = self._calls, surroundings()
        return node
