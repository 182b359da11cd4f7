# SPDX-License-Identifier: Apache-2.0
"""From the trace of one training step to the time of each of its parts.

A trace is a list of events: operations of torch and of :mod:`fedpai_kernels`, and what autograd wraps around them,
nested, perhaps on several threads. Every moment of the step belongs to exactly one event, the one that started last
among those that run. On one thread that is the innermost event, so that what is inside another is never counted
twice; and while one thread waits for the backward pass on another, it is the event over there. What is left to the
step itself and to autograd's wrappers is the time between operations: Python, autograd, and the freeing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

STEP = "fedpai.step"
"""The event that encloses the step."""

ALLOCATION = "fedpai.memory.empty_strided"
"""An allocation from the memory that fedpai_kernels keeps."""

OPERATION, GAP = "operation", "gap"

# In the order in which they are shown.
PARTS = {
    "conv forward": OPERATION,
    "conv input-grad": OPERATION,
    "conv weight-grad": OPERATION,
    "conv backward": OPERATION,  # both gradients in one
    "linear forward": OPERATION,
    "linear input-grad": OPERATION,
    "linear weight-grad": OPERATION,
    "linear backward": OPERATION,
    "norm forward": OPERATION,
    "norm backward": OPERATION,
    "attention forward": OPERATION,
    "attention backward": OPERATION,
    "residual add": OPERATION,
    "activation": OPERATION,
    "pooling forward": OPERATION,
    "pooling backward": OPERATION,
    "loss": OPERATION,
    "optimiser": OPERATION,
    "zero_grad": OPERATION,
    "layout": OPERATION,
    "memory": OPERATION,
    "other operations": OPERATION,
    "Python and autograd, forward": GAP,
    "Python and autograd, backward": GAP,
    "Python, around them": GAP,
}

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Event:
    """One event of a trace.

    Attributes:
        name: as torch gives it.
        start, end: nanoseconds.
        thread: any number that tells threads apart.
        sequence: of the autograd node that belongs to it, the same forward and backward; -1 for none.
        shapes: of its arguments; empty for what is no tensor.
    """

    name: str
    start: float
    end: float
    thread: int = 1
    sequence: int = -1
    shapes: Shapes = ()


@dataclass(frozen=True)
class Key:
    """A part, and the layer or operation within it, where there are several."""

    part: str
    layer: str = ""


@dataclass
class Spent:
    """What a part took in one step.

    Attributes:
        nanoseconds: of its own, without what is nested in it and counted elsewhere.
        events: that it consists of; 0 for gaps.
        bytes, written: of tensors that it reads or writes at least, and writes, where the trace tells them.
    """

    nanoseconds: float = 0.0
    events: int = 0
    bytes: int = 0
    written: int = 0


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, in the order in which they run."""

    name: str
    kind: str


# ---- whose moment it is ---------------------------------------------------------------------------------


def own_spans(events: Sequence[Event]) -> Iterator[tuple[int, float, float]]:
    """For each event the spans of time in which it is the one that started last among those that run: its number,
    beginning and end, in order of time.
    """
    points = [(e.end, 0, 0.0, i) for i, e in enumerate(events) if e.end > e.start]
    # Of two that start together, the longer one is outside.
    points += [(e.start, 1, -e.end, i) for i, e in enumerate(events) if e.end > e.start]
    running: list[int] = []
    since = 0.0
    for time, starts, _, index in sorted(points):
        if running and time > since:
            yield running[-1], since, time
        since = time
        if starts:
            running.append(index)
        else:
            running.remove(index)


def parents(events: Sequence[Event]) -> list[int]:
    """The event on the same thread in which each one is nested; -1 for none."""
    found = [-1] * len(events)
    stacks: dict[int, list[int]] = {}
    for index in sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].end)):
        stack = stacks.setdefault(events[index].thread, [])
        while stack and events[stack[-1]].end <= events[index].start:
            stack.pop()
        found[index] = stack[-1] if stack else -1
        stack.append(index)
    return found


# ---- what an event is part of ---------------------------------------------------------------------------

_ALLOCATIONS = {
    ALLOCATION,
    *(f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")),
}
_ADDITIONS = ("aten::add", "aten::add_")
_DIRECTIONS = {
    "fedpai::conv2d_forward": "forward",
    "fedpai::conv2d_input_grad": "input-grad",
    "fedpai::conv2d_weight_grad": "weight-grad",
    "fedpai::conv2d_backward": "backward",
    "fedpai::norm_conv2d_forward": "forward",
    "fedpai::norm_conv2d_weight_grad": "weight-grad",
    "fedpai::norm_conv2d_backward": "backward",
    "_Forward": "forward",
    "_ForwardBackward": "weight-grad",
    "aten::conv2d": "forward",
    "aten::linear": "forward",
    "aten::convolution_backward": "backward",
    "ConvolutionBackward0": "backward",
    "AddmmBackward0": "backward",
    "MmBackward0": "backward",
}
# Those that stand for a layer's forward pass; the outermost of them counts.
_LAYER_CALLS = ("_Forward", "_NormConv2d", "aten::conv2d", "aten::linear")

# By the beginning of the name, of an event or of one around it. Autograd's nodes are named after their operation.
_BEGINNINGS = (
    (("_ToBatchLast", "_ToContiguous"), "layout"),
    (("fedpai::batch_norm_backward", "_BatchNormBackward", "NativeBatchNormBackward"), "norm backward"),
    (("fedpai::batch_norm", "_BatchNorm", "aten::batch_norm"), "norm forward"),
    (("fedpai::group_norm_backward", "_GroupNormBackward", "NativeGroupNormBackward"), "norm backward"),
    (("fedpai::group_norm", "_GroupNorm", "aten::group_norm"), "norm forward"),
    (("aten::layer_norm",), "norm forward"),
    (("NativeLayerNormBackward",), "norm backward"),
    (("aten::scaled_dot_product_attention",), "attention forward"),
    (("ScaledDotProduct",), "attention backward"),
    # What is left of a norm and its convolution in one, once the convolution's own operations are taken out.
    (("_NormConv2dBackward",), "norm backward"),
    (("_NormConv2d",), "norm forward"),
    (("aten::cross_entropy", "aten::log_softmax", "aten::nll_loss"), "loss"),
    (("aten::_log_softmax", "LogSoftmaxBackward", "NllLossBackward"), "loss"),
    (("aten::relu", "aten::threshold", "aten::dropout", "ReluBackward", "aten::native_dropout"), "activation"),
    (("aten::gelu", "GeluBackward"), "activation"),
)
_POOLING = ("pool2d", "_Average", "_Max", "MaxPool2D", "AvgPool2D", "Pool2dWith")
_ENGINE = "autograd::engine::evaluate_function: "
# Nothing is computed in them: bookkeeping of tensors, as the wrappers around operations are.
_VIEWS = {
    *(f"aten::{name}" for name in ("alias", "as_strided", "detach", "expand", "flatten", "permute")),
    *(f"aten::{name}" for name in ("reshape", "_reshape_alias", "select", "slice", "squeeze", "t")),
    *(f"aten::{name}" for name in ("transpose", "unsqueeze", "view")),
}


@dataclass
class Step:
    """A step's trace, taken apart.

    Attributes:
        spent: by part.
        nanoseconds: of the event :data:`STEP`; the sum of all parts.
    """

    spent: dict[Key, Spent] = field(default_factory=dict)
    nanoseconds: float = 0.0


def take_apart(events: Sequence[Event], layers: Sequence[Layer]) -> Step:
    """The parts of a step.

    Args:
        events: of one step, one of them :data:`STEP`; what happens outside of it does not count.
        layers: in the order in which they run. Where the trace shows another number of them, they are named by
            the shapes of their arguments.

    Raises:
        ValueError: no event :data:`STEP`, or several.
    """
    roots = [event for event in events if event.name == STEP]
    if len(roots) != 1:
        raise ValueError(f"events: expected {STEP} once, got {len(roots)}")
    (root,) = roots
    events = [
        Event(e.name, max(e.start, root.start), min(e.end, root.end), e.thread, e.sequence, e.shapes)
        for e in events
        if e.end > root.start and e.start < root.end
    ]
    context = _Context(events, layers)
    step = Step(nanoseconds=root.end - root.start)
    keys = [context.key_of(index) for index in range(len(events))]
    for index, event in enumerate(events):
        key = keys[index]
        if key is not None:
            spent = step.spent.setdefault(key, Spent())
            spent.events += 1
            read, written = _moved(event)
            spent.bytes += read + written
            spent.written += written
    for index, start, end in own_spans(events):
        key = keys[index] or Key(context.gap_at(start))
        step.spent.setdefault(key, Spent()).nanoseconds += end - start
    return step


class _Context:
    """The events with what surrounds them."""

    def __init__(self, events: Sequence[Event], layers: Sequence[Layer]) -> None:
        self.events, self.parents = events, parents(events)
        backward = [event for event in events if event.name.startswith(_ENGINE)]
        self._backward = (
            min((event.start for event in backward), default=float("inf")),
            max((event.end for event in backward), default=float("inf")),
        )
        optimiser = [e.start for e in events if e.name.startswith("Optimizer.step")]
        zeroing = [e.end for e in events if e.name.startswith("Optimizer.zero_grad")]
        self._forward = (max(zeroing, default=0.0), min(self._backward[0], *optimiser, float("inf")))
        self._layer_of_sequence: dict[int, Layer] = {}
        self._layer_of_call: dict[int, Layer] = {}
        self._find_layers(layers)

    def around(self, index: int) -> Iterable[int]:
        """The event and those that it is nested in, from the innermost."""
        while index >= 0:
            yield index
            index = self.parents[index]

    def _find_layers(self, layers: Sequence[Layer]) -> None:
        names = [event.name for event in self.events]
        calls = [
            index
            for index in sorted(range(len(names)), key=lambda i: self.events[i].start)
            if names[index] in _LAYER_CALLS
            and not any(names[outer] in _LAYER_CALLS for outer in self.around(self.parents[index]))
        ]
        if len(calls) != len(layers):
            layers = [_unnamed(self.events[index]) for index in calls]
        self._layer_of_call = dict(zip(calls, layers, strict=True))
        for index, event in enumerate(self.events):
            if event.sequence >= 0 and event.start < self._backward[0]:
                for outer in self.around(index):
                    if outer in self._layer_of_call:
                        self._layer_of_sequence.setdefault(event.sequence, self._layer_of_call[outer])

    def _layer(self, index: int) -> Layer:
        for outer in self.around(index):
            event = self.events[outer]
            if outer in self._layer_of_call:
                return self._layer_of_call[outer]
            if event.name.startswith(_ENGINE) and event.sequence in self._layer_of_sequence:
                return self._layer_of_sequence[event.sequence]
        return _unnamed(self.events[index])

    def key_of(self, index: int) -> Key | None:
        """The part that an event's own time belongs to; None for the time between operations."""
        event = self.events[index]
        for outer in self.around(index):
            name = self.events[outer].name
            if name.startswith("Optimizer."):
                return Key("zero_grad" if "zero_grad" in name else "optimiser")
        if event.name in _ALLOCATIONS:
            return Key("memory")
        if event.name in _ADDITIONS:
            if event.shapes and len(event.shapes[0]) == 4:
                return Key("residual add")
            if event.start < self._forward[1] and event.shapes and not event.shapes[0]:
                return Key("norm forward")  # counts the batches
        is_operation = event.name.startswith(("aten::", "fedpai::"))
        if is_operation:
            for outer in self.around(index):
                part = self._part_of(outer)
                if part:
                    return Key(part, self._layer(outer).name if part.startswith(("conv", "linear")) else "")
            if event.name not in _VIEWS:
                return Key("other operations", event.name)
        return None

    def _part_of(self, index: int) -> str:
        name = self.events[index].name
        name = name.removeprefix(_ENGINE)
        if name in _DIRECTIONS:
            kind = "conv" if self._layer(index).kind == "conv2d" else "linear"
            return f"{kind} {_DIRECTIONS[name]}"
        for beginnings, part in _BEGINNINGS:
            if name.startswith(beginnings):
                return part
        if any(word in name for word in _POOLING) or name.startswith(("aten::mean", "MeanBackward")):
            back = name.endswith("_dx") or "ackward" in name
            return "pooling backward" if back else "pooling forward"
        return ""

    def gap_at(self, time: float) -> str:
        """The part that time between operations belongs to, by when it begins."""
        if self._backward[0] <= time < self._backward[1]:
            return "Python and autograd, backward"
        if self._forward[0] <= time < self._forward[1]:
            return "Python and autograd, forward"
        return "Python, around them"


def _unnamed(event: Event) -> Layer:
    shapes = " ".join("x".join(map(str, shape)) for shape in event.shapes if shape)
    return Layer(shapes or event.name, "linear" if "linear" in event.name else "conv2d")


# ---- what an operation must move ------------------------------------------------------------------------

_FLOAT = 4


def _moved(event: Event) -> tuple[int, int]:
    """Bytes that an operation on whole activations reads and writes at least; zeros where the trace does not tell."""
    sizes = [_numel(shape) for shape in event.shapes if len(shape) == 4]
    if not sizes:
        return 0, 0
    if event.name in ("fedpai::batch_norm_train", "fedpai::batch_norm_eval", "fedpai::group_norm"):  # x, residual -> y
        return _FLOAT * sum(sizes), _FLOAT * sizes[0]
    if event.name == "fedpai::batch_norm_statistics":  # x
        return _FLOAT * sizes[0], 0
    if event.name in ("fedpai::batch_norm_backward_", "fedpai::group_norm_backward"):  # dy, x -> dx
        return _FLOAT * sum(sizes), _FLOAT * sizes[0]
    if event.name == "fedpai::batch_norm_backward":  # dy, x, result of a ReLU -> dx, dresidual
        return _FLOAT * sum(sizes), _FLOAT * sum(sizes[1:])
    if event.name in _ADDITIONS and len(sizes) == 2:
        in_place = event.name.endswith("_")
        return _FLOAT * (1 if in_place else 2) * sizes[1], _FLOAT * sizes[0]
    return 0, 0


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
