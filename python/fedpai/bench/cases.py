# SPDX-License-Identifier: Apache-2.0
"""Layer lists: the convolutions and linear layers of a network, from the network itself or from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpai.bench.errors import BenchError

Pair = tuple[int, int]
KINDS = ("conv2d", "linear")
TRANSFORMER = "transformer"
"""The name of a list without a network: the linear layers of one block of ViT-Base (:func:`layers_of_transformer`)."""


@dataclass(frozen=True)
class LayerCase:
    """One layer, or several of the same sizes.

    Attributes:
        name: module name of the first of them.
        kind: "conv2d" or "linear".
        in_channels, out_channels: also features of a linear layer.
        kernel, stride, padding, dilation: (vertical, horizontal); (1, 1), (1, 1), (0, 0), (1, 1) for linear.
        groups: of a convolution.
        image: (height, width) of the input; (1, rows) for a linear layer, of which it is given so many for each image
            of the batch: 1, or the tokens of a transformer.
        count: how many layers of the network have these sizes.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    image: Pair = (1, 1)
    count: int = 1

    @property
    def rows(self) -> int:
        """How many inputs a linear layer is given for each image."""
        return math.prod(self.image)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        if self.kind == "linear":
            return (self.out_channels, self.in_channels)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def output(self) -> Pair:
        """(height, width) of the output."""
        h, w = (
            (self.image[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return h, w

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Of a batch of inputs; the rows of a linear layer are one dimension."""
        if self.kind == "linear":
            return (batch * self.rows, self.in_channels)
        return (batch, self.in_channels, *self.image)

    def output_shape(self, batch: int) -> tuple[int, ...]:
        """Of a batch of outputs."""
        if self.kind == "linear":
            return (batch * self.rows, self.out_channels)
        return (batch, self.out_channels, *self.output)

    @property
    def label(self) -> str:
        """Sizes in one word, e.g. ``64-128 3x3/2 @32``: channels, kernel, stride unless 1, image; or
        ``192-768 linear x64``: features, rows for each image unless 1.
        """
        if self.kind == "linear":
            rows = "" if self.rows == 1 else f" x{self.rows}"
            return f"{self.in_channels}-{self.out_channels} linear{rows}"
        stride = "" if self.stride == (1, 1) else f"/{_one_or_two(self.stride)}"
        groups = "" if self.groups == 1 else f" g{self.groups}"
        size = f"{self.kernel[0]}x{self.kernel[1]}{stride} @{_one_or_two(self.image)}"
        return f"{self.in_channels}-{self.out_channels} {size}{groups}"


def _one_or_two(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def layers_of(model: nn.Module, input_shape: Sequence[int]) -> list[LayerCase]:
    """Every convolution and linear layer, in the order in which they run, one case each.

    Args:
        model: on any device; run once on one blank image, in its present mode. On the "meta" device nothing
            is computed.
        input_shape: of one input, without the batch.
    """
    cases: list[LayerCase] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def record(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                cases.append(case_of(name, module, given[0].shape))

            handles.append(module.register_forward_pre_hook(record))
    first = next(model.parameters())
    try:
        with torch.no_grad():
            # Two images: batch norm refuses one of a single pixel.
            model(torch.zeros(2, *input_shape, dtype=first.dtype, device=first.device))
    finally:
        for handle in handles:
            handle.remove()
    return cases


def case_of(name: str, module: nn.Module, input_shape: Sequence[int]) -> LayerCase:
    """The case of one module that is given inputs of this shape, batch included."""
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            raise BenchError(
                f"layer {name}: padding {module.padding!r} is not supported here, expected numbers"
            )
        kernel, stride, padding, dilation = (
            (int(pair[0]), int(pair[1]))
            for pair in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        image = (int(input_shape[2]), int(input_shape[3]))
        return LayerCase(
            name,
            "conv2d",
            module.in_channels,
            module.out_channels,
            kernel,
            stride,
            padding,
            dilation,
            module.groups,
            image,
        )
    if isinstance(module, nn.Linear):
        rows = math.prod(int(size) for size in input_shape[1:-1])
        return LayerCase(name, "linear", module.in_features, module.out_features, image=(1, rows))
    raise TypeError(f"layer {name}: expected nn.Conv2d or nn.Linear, got {type(module).__name__}")


def layers_of_transformer() -> list[LayerCase]:
    """Hidden layer and attention of ViT-Base (arXiv 2010.11929), 768 channels; the batch is images x tokens."""
    return [
        LayerCase("mlp.fc1", "linear", 768, 3072),
        LayerCase("mlp.fc2", "linear", 3072, 768),
        LayerCase("attention.qkv", "linear", 768, 2304),
        LayerCase("attention.out", "linear", 768, 768),
    ]


def layers_named(model: str) -> list[LayerCase]:
    """Of a network by name, of :data:`TRANSFORMER`, or of a CSV file.

    Raises:
        BenchError: an unknown name, or a file that is no list.
    """
    if model == TRANSFORMER:
        return layers_of_transformer()
    return read_csv(Path(model)) if model.endswith(".csv") else layers_of_network(model)


def layers_of_network(name: str, in_channels: int = 3, image_size: int = 32) -> list[LayerCase]:
    """:func:`layers_of` for a network of :mod:`fedpai.models`, without computing anything.

    Raises:
        BenchError: an unknown network.
    """
    from fedpai import models

    try:
        with torch.device("meta"):
            model = models.create(name, in_channels=in_channels, image_size=image_size)
    except ValueError as error:
        raise BenchError(f"--model: {error}") from error
    return layers_of(model, (in_channels, image_size, image_size))


def merged(cases: Iterable[LayerCase]) -> list[LayerCase]:
    """Cases of equal sizes as one, under the first one's name, with their counts added."""
    found: dict[LayerCase, LayerCase] = {}
    for case in cases:
        sizes = replace(case, name="", count=1)
        earlier = found.get(sizes)
        found[sizes] = case if earlier is None else replace(earlier, count=earlier.count + case.count)
    return list(found.values())


def select(
    cases: Sequence[LayerCase], patterns: Sequence[str], kinds: Sequence[str] = KINDS
) -> list[LayerCase]:
    """Those of these kinds whose name or label a pattern matches; no patterns match all.

    Args:
        cases: where to choose from.
        patterns: shell patterns (``layer1*``), or parts of the name or label (``3x3/2``).
        kinds: "conv2d", "linear".
    """
    return [
        case
        for case in cases
        if case.kind in kinds
        and (
            not patterns
            or any(
                fnmatch(text, pattern) or pattern in text
                for pattern in patterns
                for text in (case.name, case.label)
            )
        )
    ]


# ---- CSV files ------------------------------------------------------------------------------------------

_COLUMNS = [field.name for field in fields(LayerCase)]
_PAIRS = ("kernel", "stride", "padding", "dilation", "image")
_NUMBERS = ("in_channels", "out_channels", "groups", "count")


def to_csv(cases: Iterable[LayerCase]) -> str:
    """A header and one line per case; pairs as ``3x3``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for case in cases:
        values = [getattr(case, name) for name in _COLUMNS]
        writer.writerow([f"{v[0]}x{v[1]}" if isinstance(v, tuple) else v for v in values])
    return text.getvalue()


def read_csv(path: Path) -> list[LayerCase]:
    """What :func:`to_csv` wrote.

    Raises:
        BenchError: a file that cannot be read, other columns, or a value of the wrong form, with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--model: cannot read {path} ({error})") from error
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != _COLUMNS:
        raise BenchError(
            f"--model: {path}: expected the columns {','.join(_COLUMNS)}, got {reader.fieldnames}"
        )
    cases = []
    for record in reader:
        try:
            case = _from_record(record)
        except (ValueError, AttributeError, TypeError) as error:
            raise BenchError(f"--model: {path}, line {reader.line_num}: {error}") from error
        cases.append(case)
    if not cases:
        raise BenchError(f"--model: {path} lists no layers")
    return cases


def _from_record(record: dict[str, str]) -> LayerCase:
    values: dict[str, object] = {"name": record["name"], "kind": record["kind"]}
    if record["kind"] not in KINDS:
        raise ValueError(f"kind: got {record['kind']!r}, expected conv2d or linear")
    for name in _NUMBERS:
        values[name] = int(record[name])
    for name in _PAIRS:
        first, _, second = record[name].partition("x")
        values[name] = (int(first), int(second))
    case = LayerCase(**values)  # type: ignore[arg-type]
    positive = (
        *(case.in_channels, case.out_channels, case.groups, case.count),
        *(*case.kernel, *case.stride, *case.dilation, *case.image),
    )
    if min(positive) < 1 or min(case.padding) < 0 or min(case.output) < 1:
        raise ValueError("sizes must be positive, and the image at least as large as the kernel")
    if case.in_channels % case.groups or case.out_channels % case.groups:
        raise ValueError(f"groups: {case.groups} do not divide the channels")
    return case
