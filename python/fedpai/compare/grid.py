# SPDX-License-Identifier: Apache-2.0
"""From lists of methods, sparsities, partitions and seeds to the runs that they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from fedpai.federation.config import ConfigError, RunConfig, one_of, option

if TYPE_CHECKING:  # a parser of command lines, which reads AXES, must not wait for torch
    from fedpai.data import Dataset

AXES = ("seed", "model", "alpha", "method", "sparsity", "criterion", "allocation", "mask_mode")
"""Settings that `fedpai compare` takes lists of, the slowest first: a study that is stopped has whole comparisons of
its first seeds. Those from sparsity on count only for methods that use them."""

Values = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: of its folder: every axis that means something to the method.
        family: the method, and of the axes beside the sparsity those that the grid varies: a line in the plots.
        label: the same with the sparsity: a line in the tables, which all seeds share.
        config: its settings. Those that mean nothing to the method are as by default.
    """

    name: str
    family: str
    label: str
    config: RunConfig


def expand(axes: Values, settings: Mapping[str, Any], explicit: frozenset[str] = frozenset()) -> list[Cell]:
    """All runs of a grid. A method that does not use an axis runs once for all its values.

    Args:
        axes: values of AXES; an absent one has the default alone.
        settings: all other settings of the runs.
        explicit: those axes and settings that a person asked for.

    Raises:
        ConfigError: an unknown method, a value that cannot be, or something asked for that no method of the grid uses.
    """
    from fedpai import methods

    lists = {key: list(axes.get(key, [getattr(RunConfig, key)])) for key in AXES}
    for name in lists["method"]:
        one_of("method", name, methods.names())
    uses = {name: methods.METHODS[name].uses for name in lists["method"]}
    particular = frozenset[str]().union(*(method.uses for method in methods.METHODS.values()))
    for key in sorted((particular & explicit) - frozenset[str]().union(*uses.values())):
        raise ConfigError(f"{option(key)} means nothing to {' and '.join(lists['method'])}")
    cells: dict[str, Cell] = {}
    for values in product(*lists.values()):
        point = dict(zip(lists, values, strict=True))
        foreign = particular - uses[point["method"]]
        point = {key: value for key, value in point.items() if key not in foreign}
        own = {key: value for key, value in settings.items() if key not in foreign}
        name = "-".join(word for key in _NAMED if (word := _word(key, point.get(key))))
        if name not in cells:
            varied = (key for key in ("criterion", "allocation", "mask_mode") if len(lists[key]) > 1)
            family = " ".join([point["method"], *(str(point[key]) for key in varied if key in point)])
            label = f"{family} {100 * point['sparsity']:.6g} %" if "sparsity" in point else family
            cells[name] = Cell(name, family, label, RunConfig(**own, **point))
    return list(cells.values())


_NAMED = ("model", "method", "sparsity", "criterion", "allocation", "mask_mode", "alpha", "seed")


def _word(key: str, value: Any) -> str:
    """A value in a cell's name, empty for none. Numbers are written in full, so that no two share a name; a colon
    would be a host to copying tools.
    """
    if key == "alpha":
        return partition(value)
    if key == "seed":
        return f"seed{value}"
    return "" if value is None else str(value).replace(":", "=")


def partition(alpha: float | None) -> str:
    """How images are shared, as one word."""
    return "iid" if alpha is None else f"alpha{alpha}"


def check(cells: Sequence[Cell], data: Dataset) -> None:
    """Finds what would stop a run of the grid before the first one starts.

    Raises:
        ConfigError: a name that does not exist, a mask that a network cannot have, a partition that cannot be drawn.
    """
    from fedpai.federation.runner import Run, split

    for config in dict.fromkeys(replace(cell.config, alpha=None, seed=0) for cell in cells):
        Run(config, data=data)
    for config in {(cell.config.alpha, cell.config.seed): cell.config for cell in cells}.values():
        split(config, data)
