# SPDX-License-Identifier: Apache-2.0
"""Which modules write, carry and read which channels, read from traces of a model.

Channels begin where a convolution or linear layer writes them, pass through what treats each by itself (batch norm,
activations, pooling, depthwise convolutions, flattening), are joined by sums and products, and end where a convolution
or linear layer reads them. Anything else may look at them in any way: what it is given stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..ops.activation import activation_of_call
from .packed import PackedWeight
from .trace import Traces

__all__ = ["Channels", "Reading", "Value", "plain_type", "read_channels"]


@dataclass(eq=False)
class Channels:
    """Channels that are the same wherever the activations carry them, so that they stay or go together.

    Attributes:
        size: how many.
        writers: Conv2d and Linear, of whose outputs each is one of the channels.
        readers: Conv2d and Linear; an input is a channel, or one pixel of a flattened one.
        carriers: norms and depthwise convolutions.
        fixed: whether something else looks at them, so that all stay.
        keeps_zeros: whether a channel that all writers write as zeros is zero for all readers.
    """

    size: int
    writers: list[nn.Module] = field(default_factory=list)
    readers: list[nn.Module] = field(default_factory=list)
    carriers: list[nn.Module] = field(default_factory=list)
    fixed: bool = False
    keeps_zeros: bool = True

    def add(self, module: nn.Module, role: str) -> None:
        modules: list[nn.Module] = getattr(self, role)
        if module not in modules:
            modules.append(module)

    def take_in(self, other: Channels) -> None:
        for role in ("writers", "readers", "carriers"):
            for module in getattr(other, role):
                self.add(module, role)
        self.fixed |= other.fixed
        self.keeps_zeros &= other.keeps_zeros


@dataclass
class Value:
    """A result in a trace, whose channels are known.

    Attributes:
        channels: what it carries.
        form: "image" (N, C, H, W); "rows" (..., F), F a multiple of C; "shape", the sizes of such a tensor.
    """

    channels: Channels
    form: str


@dataclass
class Reading:
    """What :func:`read_channels` found.

    Attributes:
        channels: all of them.
        written, read: the channels that a Conv2d or Linear writes and reads, where they are known. A depthwise
            convolution is a carrier instead.
        traces: each trace, with the value of each node that has one.
    """

    channels: list[Channels]
    written: dict[nn.Module, Channels]
    read: dict[nn.Module, Channels]
    traces: list[tuple[fx.Graph, dict[fx.Node, Value]]]


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a module is of, or that a class of this package stands for."""
    if isinstance(module, PackedWeight):
        return module.dense_type
    if type(module).__module__.startswith("fedpai_kernels.nn"):
        return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    return type(module)


def read_channels(
    traces: Traces, modules: Mapping[str, nn.Module], left_alone: Collection[nn.Module], hooked: Collection[str]
) -> Reading:
    """Follows the channels through the traces of a model, all of its modes together.

    Args:
        traces: of the model.
        modules: of the model, by every name.
        left_alone: modules that must see and hand on all channels.
        hooked: paths of modules within which all must.
    """
    reader = _Reader(modules, set(left_alone), set(hooked))
    for graph in traces.graphs:
        reader.read(graph)
    return reader.reading()


# Whether zero stays zero, by class of module and by function.
_ELEMENTWISE: dict[type[nn.Module], bool] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.Mish), True),
    **dict.fromkeys((nn.Tanh, nn.Hardswish, nn.Softsign, nn.Identity, nn.Dropout), True),
    **dict.fromkeys((nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus), False),
}
_ELEMENTWISE_CALLS: dict[Any, bool] = {
    **dict.fromkeys((torch.tanh, "tanh", "tanh_", F.elu, F.selu, F.celu, F.mish, F.hardswish, F.softsign), True),
    **dict.fromkeys((F.dropout, "contiguous", "clone", torch.clone), True),
    **dict.fromkeys((torch.sigmoid, "sigmoid", "sigmoid_", F.hardsigmoid, F.softplus), False),
}
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d)
_POOL_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout2d}
_MEANS = {torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"}
_SUMS = {torch.add, operator.add, operator.iadd, "add", "add_", torch.sub, operator.sub, "sub", "sub_"}
_PRODUCTS = {torch.mul, operator.mul, "mul", "mul_"}
_PIXELS = ((2, 3), [2, 3], (-2, -1), [-2, -1], (3, 2), [3, 2], (-1, -2), [-1, -2])
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)


class _Reader:
    def __init__(self, modules: Mapping[str, nn.Module], left_alone: set[nn.Module], hooked: set[str]) -> None:
        self._modules, self._left_alone, self._hooked = modules, left_alone, hooked
        self._written: dict[nn.Module, Channels] = {}
        self._read: dict[nn.Module, Channels] = {}
        self._carried: dict[nn.Module, Channels] = {}
        self._all: list[Channels] = []
        self._traces: list[tuple[fx.Graph, dict[fx.Node, Value]]] = []
        self._values: dict[fx.Node, Value] = {}
        self._batch_sizes: set[fx.Node] = set()

    def read(self, graph: fx.Graph) -> None:
        self._values = {}
        self._traces.append((graph, self._values))
        calls = Counter(self._modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
        self._left_alone |= {m for m, count in calls.items() if count > 1 and (m._parameters or m._buffers)}
        for node in graph.nodes:
            if node.op == "get_attr":  # a parameter that the code of a forward uses by itself
                owner = self._modules.get(str(node.target).rpartition(".")[0])
                self._left_alone |= set() if owner is None else {owner}
        for node in graph.nodes:
            within_hooks = any(path in self._hooked for path, _ in node.meta["calls"])
            value = None if within_hooks else self._value_of(node)
            if value is not None:
                self._values[node] = value
            elif node not in self._batch_sizes:
                for given in node.all_input_nodes:
                    self._fix(given)
                if node.op == "call_module":
                    self._left_alone.add(self._modules[str(node.target)])

    def reading(self) -> Reading:
        for channels_of in (self._written, self._read, self._carried):
            for module, channels in channels_of.items():
                channels.fixed |= module in self._left_alone
        return Reading(self._all, self._written, self._read, self._traces)

    # ---- what a node does with the channels; None: nobody knows

    def _value_of(self, node: fx.Node) -> Value | None:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            plain = len(node.args) == 1 and not node.kwargs and module not in self._left_alone
            return self._through_module(module, node.args[0]) if plain else None
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        if self._is_batch_size(node):
            self._batch_sizes.add(node)
            return None
        if node.target in _SUMS or node.target in _PRODUCTS:
            return self._joined(node)
        x = self._known(node.args[0])
        if x is None or x.form == "shape":
            return None
        return Value(x.channels, "shape") if _is_shape(node) else self._through_call(node, x)

    def _through_module(self, module: Any, given: Any) -> Value | None:
        kind, x = plain_type(module), self._known(given)
        if kind is nn.Conv2d and module.groups == 1:
            return self._layer(module, given, "image", module.in_channels, module.out_channels)
        if kind is nn.Linear:
            return self._layer(module, given, "rows", module.in_features, module.out_features)
        if x is None or x.form == "shape":
            return None
        channels = x.channels
        if kind is nn.Conv2d:
            depthwise = module.groups == module.in_channels == module.out_channels == channels.size
            return self._carrier(module, x, module.bias is None) if depthwise and x.form == "image" else None
        if kind in _NORMS:
            form, pixels = ("rows", module.num_features // channels.size) if kind is nn.BatchNorm1d else ("image", 1)
            fits = x.form == form and module.num_features == channels.size * pixels
            return self._carrier(module, x, not module.affine and module.running_mean is None) if fits else None
        if kind in _ELEMENTWISE:
            channels.keeps_zeros &= _ELEMENTWISE[kind]
            return x
        if kind in _POOLS:
            return x if x.form == "image" and not getattr(module, "return_indices", False) else None
        if kind is nn.Flatten and x.form == "image" and (module.start_dim, module.end_dim) == (1, -1):
            return Value(channels, "rows")
        return None

    def _through_call(self, node: fx.Node, x: Value) -> Value | None:
        args, kwargs, image = node.args[1:], dict(node.kwargs), x.form == "image"
        if node.target in ("view", "reshape", torch.reshape):
            sizes: Any = args[0] if len(args) == 1 else args
            flat = any(sizes == (size, -1) or sizes == [size, -1] for size in self._batch_sizes)
            return Value(x.channels, "rows") if image and flat else None
        if node.target in ("flatten", torch.flatten):
            flat = (args, kwargs) in (((1,), {}), ((), {"start_dim": 1}))
            return Value(x.channels, "rows") if image and flat else None
        if node.target in _MEANS:
            given = {**dict(zip(("dim", "keepdim"), args, strict=False)), **kwargs}
            over_pixels = given.keys() <= {"dim", "keepdim"} and given.get("dim") in _PIXELS
            form = "image" if given.get("keepdim", False) else "rows"
            return Value(x.channels, form) if image and over_pixels else None
        if len(node.all_input_nodes) > 1:
            return None
        if activation_of_call(node.target, node.args, kwargs) is not None:
            return x
        if node.target in _ELEMENTWISE_CALLS:
            x.channels.keeps_zeros &= _ELEMENTWISE_CALLS[node.target]
            return x
        indices = kwargs.get("return_indices", False) or any(arg is True for arg in args)
        return x if node.target in _POOL_CALLS and image and not indices else None

    def _joined(self, node: fx.Node) -> Value | None:
        """The sum or product of two tensors, or of one and a number."""
        if len(node.args) != 2 or node.kwargs:
            return None
        a, b = (self._known(arg) for arg in node.args)
        if a is not None and b is not None:
            if a.form != b.form or a.form == "shape" or a.channels.size != b.channels.size:
                return None
            self._merge(a.channels, b.channels)
            return a
        x = a or b
        if x is None or x.form == "shape" or not any(isinstance(arg, int | float) for arg in node.args):
            return None
        x.channels.keeps_zeros &= node.target in _PRODUCTS
        return x

    def _is_batch_size(self, node: fx.Node) -> bool:
        source: Any = None
        if node.target == "size" and node.args[1:] == (0,):
            source = node.args[0]
        elif node.target is operator.getitem and node.args[1:] == (0,) and _is_shape(node.args[0]):
            source = node.args[0].args[0]  # type: ignore[union-attr]
        return isinstance(source, fx.Node) and (source in self._values or source.op == "placeholder")

    # ---- keeping account

    def _known(self, argument: Any) -> Value | None:
        return self._values.get(argument) if isinstance(argument, fx.Node) else None

    def _fix(self, argument: Any) -> None:
        value = self._known(argument)
        if value is not None:
            value.channels.fixed = True

    def _layer(self, module: nn.Module, given: Any, form: str, inputs: int, outputs: int) -> Value:
        x = self._known(given)
        pixels = 1 if x is None or form == "image" else inputs // x.channels.size
        if x is not None and x.form == form and inputs == x.channels.size * pixels:
            self._enter(self._read, module, x.channels)
            self._read[module].add(module, "readers")
        else:
            self._fix(given)
            if module in self._read:  # in another mode
                self._read[module].fixed = True
        if module not in self._written:
            self._all.append(Channels(outputs, writers=[module]))
            self._written[module] = self._all[-1]
        return Value(self._written[module], form)

    def _carrier(self, module: nn.Module, x: Value, keeps_zeros: bool) -> Value:
        self._enter(self._carried, module, x.channels)
        x.channels.add(module, "carriers")
        x.channels.keeps_zeros &= keeps_zeros
        return x

    def _enter(self, registry: dict[nn.Module, Channels], module: nn.Module, channels: Channels) -> None:
        before = registry.setdefault(module, channels)
        if before.size == channels.size:
            self._merge(before, channels)
        else:  # another mode of the model has other channels there
            before.fixed = channels.fixed = True

    def _merge(self, a: Channels, b: Channels) -> None:
        if a is b:
            return
        a.take_in(b)
        self._all.remove(b)
        for registry in (self._written, self._read, self._carried):
            registry.update({module: a for module, channels in registry.items() if channels is b})
        for _, values in self._traces:
            for value in values.values():
                if value.channels is b:
                    value.channels = a


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    return (node.target is getattr and node.args[1:] == ("shape",)) or (node.target == "size" and len(node.args) == 1)
