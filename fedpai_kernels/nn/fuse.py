# SPDX-License-Identifier: Apache-2.0
"""Finds what is computed in one pass with a norm, by tracing the model with `torch.fx`.

What is found: an activation (ReLU, ReLU6, LeakyReLU, SiLU, GELU) that alone reads the norm; a sum that alone reads it,
as at the end of a residual block; a sum that alone reads it with an activation that alone reads the sum; and a sparse
convolution that alone reads the norm or the norm's activation. Of a group norm, only a ReLU.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..ops.activation import NONE, RELU, Activation, activation_of_call, activation_of_module
from .packed import PackedWeight
from .sites import Site
from .trace import Traces, trace_modes

__all__ = ["Fusions", "find_fusions"]


@dataclass
class Fusions:
    """What :func:`find_fusions` found.

    Attributes:
        sites: (owner, site): norms that are added, activated or convolved by the code of the owner's forward.
        others: reason by name, for every other BatchNorm2d and GroupNorm.
        untraced: why nothing was found, where the model cannot be traced; else empty.
    """

    sites: list[tuple[nn.Module, Site]] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    untraced: str = ""


def find_fusions(
    model: nn.Module, sparse: Collection[nn.Module] = (), traces: Traces | None = None
) -> Fusions:
    """What can be computed in one pass with each BatchNorm2d and GroupNorm of `model`, in training and in evaluation
    mode alike.

    The norm must be called once, and what reads it must be its only reader: a sum of the norm with another tensor, in
    any spelling (``+``, ``+=``, `torch.add`), an activation, function or module, or both; or one of the convolutions
    `sparse`, after the norm or after its activation. What comes last must be called by the forward of one module, which
    the norm is a part of and is called from, directly or through other modules. The model is not changed; `traces` are
    those of the model, where somebody has made them before.
    """
    by_name = dict(model.named_modules())
    convs = {name for name, m in model.named_modules(remove_duplicate=False) if any(m is c for c in sparse)}
    norms = [name for name, m in by_name.items() if type(m) in _NORMS]
    if not norms:
        return Fusions()
    traces = trace_modes(model) if traces is None else traces
    if traces.failure:
        return Fusions(others=dict.fromkeys(norms, "not traced"), untraced=traces.failure)
    found = [_Reading(graph, model, convs).found for graph in traces.graphs]
    fusions = Fusions()
    for name in norms:
        what, again = (modes.get(name, "not called") for modes in found)
        if what != again:
            fusions.others[name] = "training and evaluation differ"
        elif isinstance(what, str):
            fusions.others[name] = what
        else:
            fusions.sites.append((by_name[what.owner], what.site))
    return fusions


_NORMS = (nn.BatchNorm2d, nn.GroupNorm)

# ---- reading a trace
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    owner: str
    site: Site


_Found = _Place | str  # a string: why there is nothing

_ADDS = {torch.add, operator.add, "add"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}


class _Reading:
    """What one trace says about each norm: `found`, by name."""

    def __init__(self, graph: fx.Graph, model: nn.Module, convs: Collection[str]) -> None:
        self._convs = convs
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._calls: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self._calls.setdefault(id(self._module(node)), []).append(node)
        self.found: dict[str, _Found] = {}
        sums: dict[fx.Node, fx.Node] = {}  # the sum's norm
        # A sum of two norms goes with the later one: less lies between the norm and the sum.
        for nodes in sorted(self._calls.values(), key=lambda nodes: -self._order[nodes[0]]):
            norm = nodes[0]
            if type(self._module(norm)) in _NORMS:
                name = str(norm.target)
                self.found[name] = what = self._read(norm, len(nodes), sums)
                if isinstance(what, _Place):
                    sums[next(iter(norm.users))] = norm

    def _module(self, node: fx.Node) -> nn.Module:
        return self._modules[str(node.target)]

    def _read(self, norm: fx.Node, calls: int, sums: dict[fx.Node, fx.Node]) -> _Found:
        if calls != 1:
            return f"called {calls} times"
        if len(norm.users) != 1:
            return f"read {len(norm.users)} times"
        (reader,) = norm.users
        if not _in_the_same_surroundings(norm, reader):
            return f"followed by {self._title(reader)} in another gradient mode or checkpoint"
        is_batch_norm = type(self._module(norm)) is nn.BatchNorm2d
        activation = self._activation(reader)
        conv = self._conv_after(norm if activation is None else reader)
        if is_batch_norm and conv is not None:
            place = self._place(norm, None, None if reader is conv else reader, conv)
            if isinstance(place, _Place) or reader is conv:
                return place
        if activation is not None and (is_batch_norm or activation == RELU):
            return self._place(norm, None, reader)
        if not is_batch_norm or not self._is_sum_of(reader, norm):
            return f"followed by {self._title(reader)}"
        if reader in sums:
            return f"its sum goes with {sums[reader].target}"
        after = next(iter(reader.users)) if len(reader.users) == 1 else None
        # Directly after the sum, so that nothing can change the summands in between, and in the same forward.
        follows = after is not None and after is reader.next and _caller(after) == _caller(reader)
        if after is None or not follows or self._activation(after) is None:
            after = None
        return self._place(norm, reader, after)

    def _conv_after(self, node: fx.Node) -> fx.Node | None:
        """The sparse convolution that alone reads the node."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or reader.op != "call_module" or str(reader.target) not in self._convs:
            return None
        if not _in_the_same_surroundings(node, reader):
            return None
        return reader if reader.args == (node,) and not reader.kwargs else None

    def _activation(self, node: fx.Node) -> Activation | None:
        if node.op == "call_module":
            return activation_of_module(self._module(node)) if len(node.args) == 1 and not node.kwargs else None
        if node.op not in ("call_function", "call_method"):
            return None
        called = activation_of_call(node.target, node.args, node.kwargs)
        return None if called is None else called[0]

    def _is_sum_of(self, node: fx.Node, norm: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
            return False
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            return False
        # In place it is the first operand that changes, and others may see it.
        return node.target in _ADDS or (node.target in _ADDS_IN_PLACE and a is norm)

    def _place(
        self, norm: fx.Node, added: fx.Node | None, activation: fx.Node | None, conv: fx.Node | None = None
    ) -> _Found:
        """The site where `added`, else `conv`, else `activation` is the last to be computed with the norm."""
        last = added or conv or activation
        assert last is not None
        owner = _caller(last)
        waiting = [norm] if conv is None or activation is None else [norm, activation]
        if not all(owner in node.meta["calls"] for node in waiting):
            return f"followed by {self._title(last)} in another module"
        if not self._may_wait(norm, waiting, last):
            return "its input may change before its result is read"
        between = []
        for node in waiting:
            stack = node.meta["calls"]
            between += [path for path, _ in stack[stack.index(owner) + 1 :]]
        what = NONE if activation is None else self._activation(activation)
        assert what is not None
        module = str(activation.target) if activation is not None and activation.op == "call_module" else ""
        conv_module = str(conv.target) if conv is not None else ""
        prefix = f"{owner[0]}." if owner[0] else ""
        paths = [str(norm.target), *dict.fromkeys(between), module, conv_module]
        if not all(path.startswith(prefix) for path in paths if path):
            return f"not a part of {owner[0]}, which reads it"
        name, *through, activated, read = (path[len(prefix) :] for path in paths)
        return _Place(owner[0], Site(name, tuple(through), activated, added is not None, what, read))

    def _may_wait(self, norm: fx.Node, waiting: list[fx.Node], until: fx.Node) -> bool:
        """Whether the norm's input is sure to be the same later: nothing happens that could change it, or nobody
        else has it."""
        between, node = [], norm.next
        while node is not until:
            between.append(node)
            node = node.next
        if all(node in waiting or self._changes_nothing(node) for node in between):
            return True
        x = norm.args[0] if norm.args else None
        return (
            isinstance(x, fx.Node)
            and len(x.users) == 1
            and x.op == "call_module"
            and isinstance(self._module(x), (nn.Conv2d, PackedWeight))
        )

    def _changes_nothing(self, node: fx.Node) -> bool:
        pure = (nn.Identity, nn.Conv2d, *_NORMS, PackedWeight)
        return node.op == "call_module" and isinstance(self._module(node), pure)

    def _title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        return str(getattr(node.target, "__name__", node.target))


def _in_the_same_surroundings(a: fx.Node, b: fx.Node) -> bool:
    same: bool = a.meta["surroundings"] == b.meta["surroundings"]
    return same


def _caller(node: fx.Node) -> tuple[str, int]:
    """Whose forward made the node."""
    caller: tuple[str, int] = node.meta["calls"][-1]
    return caller
