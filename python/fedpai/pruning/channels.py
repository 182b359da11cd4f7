# SPDX-License-Identifier: Apache-2.0
"""Which layers of a network share channels: what must be pruned together for a channel to disappear.

The network is traced with ``torch.fx``; no image passes. Convolutions and linear layers define channels; norms,
activations, pooling, dropout and flattening carry them; an addition joins those of its two sides. Channels of
the network's input and output stay, and so do those that any other module or function touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from fedpai.pruning.criteria import Layers

# What maps each channel to itself. Not group norm and its like: they mix channels.
_CARRIERS: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout,
    nn.Dropout2d, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.MaxPool2d, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip
_CARRYING: frozenset[Callable[..., Any]] = frozenset({
    functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d, functional.avg_pool2d, functional.dropout,
    functional.elu, functional.gelu, functional.hardsigmoid, functional.hardswish, functional.hardtanh,
    functional.leaky_relu, functional.max_pool2d, functional.mish, functional.relu, functional.relu6,
    functional.selu, functional.sigmoid, functional.silu, functional.softplus, functional.tanh, torch.relu,
    torch.sigmoid, torch.tanh,
})  # fmt: skip
_CARRYING_METHODS = frozenset({"clone", "contiguous", "relu", "relu_", "sigmoid", "tanh"})
_ADDITIONS: frozenset[Callable[..., Any]] = frozenset({operator.add, operator.iadd, torch.add})
_ADDING_METHODS = frozenset({"add", "add_"})
_SHAPES = frozenset({"size", "dim"})


@dataclass
class ChannelGroup:
    """Channels that are kept or dropped together.

    Attributes:
        size: how many there are.
        writers: layers whose output channels they are.
        readers: layers whose input they are, and how many consecutive input features each channel is there.
    """

    size: int
    writers: list[str] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)


class _Space:
    """The channels of some value, joined with others by :meth:`root` (union-find)."""

    def __init__(self, size: int | None, pinned: str | None = None) -> None:
        self.size, self.pinned, self._parent = size, pinned, self

    def root(self) -> _Space:
        space = self
        while space._parent is not space:
            space = space._parent
        return space

    def pin(self, why: str) -> None:
        self.root().pinned = self.root().pinned or why

    def join(self, other: _Space, why: str) -> None:
        """One space of two; spaces of different sizes (broadcasting) are pinned instead."""
        one, two = self.root(), other.root()
        if one.size is None or one.size != two.size:
            one.pin(why)
            two.pin(why)
        elif one is not two:
            one.pinned = one.pinned or two.pinned
            two._parent = one


@dataclass(frozen=True)
class _Value:
    """What flows along an edge: its channels, and where they are: dimension 1 of an image (``"image"``), several
    features each after flattening (``"flat"``), or the last dimension (``"last"``)."""

    space: _Space
    form: str


def channel_groups(model: nn.Module, layers: Layers) -> list[ChannelGroup]:
    """The groups of channels that can be pruned, in the order in which the network computes them.

    Args:
        model: traced; not run and not changed.
        layers: its prunable layers; channels of all others stay.

    Raises:
        ValueError: a network that ``torch.fx`` cannot trace, or in which no channel can be pruned (naming what
            holds the channels of its first layer).
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"structure: 'channel' needs a network that torch.fx can trace: {error}") from error
    walk = _Walk(model, layers)
    for node in graph.nodes:
        walk.visit(node)
    return walk.groups()


class _Walk:
    """Propagates channels through the traced graph."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._modules = dict(model.named_modules())
        self._layers = layers
        self._values: dict[fx.Node, _Value] = {}
        # By layer: the channels it reads, features per channel, and the channels it writes.
        self._reads: dict[str, tuple[_Space, int]] = {}
        self._writes: dict[str, _Space] = {}
        self._strange: set[str] = set()

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._values[node] = _Value(_Space(None, "the network's input"), "image")
        elif node.op == "output":
            self._pin_inputs(node, "the network's output")
        elif (value := self._propagated(node)) is not None:
            self._values[node] = value
        elif not self._is_shape(node):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
            what = f"{node.op.removeprefix('call_')} {name}"
            self._pin_inputs(node, what)
            self._pin_layer(str(name), what)
            self._values[node] = _Value(_Space(None, what), "image")

    def _propagated(self, node: fx.Node) -> _Value | None:
        """The node's value if it is known what happens to the channels."""
        first = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if first is None:
            return None
        if node.op == "call_module":
            return self._module(str(node.target), first)
        method = node.op == "call_method"
        if node.target in _ADDITIONS or (method and node.target in _ADDING_METHODS):
            return self._added(node, first)
        if node.target in _CARRYING or (method and node.target in _CARRYING_METHODS):
            return first
        if node.target is torch.flatten or (method and node.target in ("flatten", "view", "reshape")):
            return self._flattened(node, first)
        if node.target is torch.mean or (method and node.target == "mean"):
            return self._averaged(node, first)
        return None

    def _module(self, name: str, value: _Value) -> _Value | None:
        module = self._modules[name]
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._layer(name, module, value)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _Value(value.space, "last" if value.form == "last" else "flat")
        return value if isinstance(module, _CARRIERS) else None

    def _layer(self, name: str, module: nn.Conv2d | nn.Linear, value: _Value) -> _Value | None:
        features, form = self._features(module, value)
        space = value.space.root()
        if features is None:
            return None
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        if depthwise:
            same = module.weight.shape[1] == 1 and module.weight.shape[0] == space.size
            if not same:
                return None
        written = space if depthwise else _Space(int(module.weight.shape[0]))
        if name not in self._layers or name in self._strange:
            space.pin(f"{name}, which is not pruned")
            written.pin(f"{name}, which is not pruned")
        if name in self._writes:  # called again: both calls see the same weight
            space.join(self._reads[name][0], name)
            written.join(self._writes[name], name)
        self._reads[name], self._writes[name] = (space, 0 if depthwise else features), written
        return _Value(written, form)

    @staticmethod
    def _features(module: nn.Conv2d | nn.Linear, value: _Value) -> tuple[int | None, str]:
        """How many consecutive inputs of the layer a channel is, and the form of the layer's output; ``None``:
        the layer's inputs are not these channels."""
        if isinstance(module, nn.Conv2d):
            return (1 if value.form == "image" else None), "image"
        size = value.space.root().size
        if size is None:
            return 1, "last"  # the network's input, or pinned already
        if value.form == "last":
            return (1 if module.in_features == size else None), "last"
        whole = value.form == "flat" and module.in_features % size == 0
        return (module.in_features // size if whole else None), "last"

    def _added(self, node: fx.Node, first: _Value) -> _Value | None:
        other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        if isinstance(other, int | float):
            return first
        second = self._values.get(other) if isinstance(other, fx.Node) else None
        if second is None or second.form != first.form:
            return None
        first.space.join(second.space, "an addition of other sizes")
        return first

    @staticmethod
    def _flattened(node: fx.Node, value: _Value) -> _Value | None:
        """``flatten(1)`` and ``view(n, -1)``: everything but the batch in one dimension."""
        rest = node.args[1:]
        dims = (*rest, *(node.kwargs[key] for key in ("start_dim", "end_dim") if key in node.kwargs))
        if node.target in ("view", "reshape"):
            whole = len(rest) == 2 and isinstance(rest[0], fx.Node) and rest[1] == -1
        else:
            whole = dims in ((1,), (1, -1))
        return _Value(value.space, "last" if value.form == "last" else "flat") if whole else None

    @staticmethod
    def _averaged(node: fx.Node, value: _Value) -> _Value | None:
        """``mean((2, 3))``: the pixels of an image."""
        dims = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        whole = value.form == "image" and isinstance(dims, tuple | list) and {d % 4 for d in dims} == {2, 3}
        return _Value(value.space, "last") if whole else None

    def _is_shape(self, node: fx.Node) -> bool:
        """A size of a value, which has no channels."""
        sized = node.op == "call_method" and node.target in _SHAPES
        unrelated = not any(source in self._values for source in node.all_input_nodes)
        return sized or unrelated or (node.target is getattr and node.args[1] == "shape")

    def _pin_inputs(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            if source in self._values:
                self._values[source].space.pin(why)

    def _pin_layer(self, name: str, why: str) -> None:
        """A layer that is called in a way not understood keeps its channels in every call."""
        self._strange.add(name)
        if name in self._writes:
            self._reads[name][0].pin(why)
            self._writes[name].pin(why)

    def groups(self) -> list[ChannelGroup]:
        found: dict[_Space, ChannelGroup] = {}
        for name in self._layers:
            if name not in self._writes:
                continue
            space = self._writes[name].root()
            if space.pinned is None:
                found.setdefault(space, ChannelGroup(space.size or 0)).writers.append(name)
        for name in self._layers:
            if name not in self._reads:
                continue
            space, features = self._reads[name]
            if features and space.root() in found:
                found[space.root()].readers[name] = features
        groups = [group for group in found.values() if group.readers]
        if not groups:
            first = next(iter(self._layers))
            why = self._writes[first].root().pinned if first in self._writes else "it is not called"
            raise ValueError(
                f"structure: no channel of this network can be pruned; those of {first} are held by {why}"
            )
        return groups
