# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench layers`: every layer of a network at several densities, all contenders taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpai.bench import masks as bench_masks
from fedpai.bench.cases import TRANSFORMER, LayerCase, layers_named, merged, select
from fedpai.bench.device import Device, cpu
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.rivals import CONTENDERS, DEFAULT_RIVALS, RIVALS, Contender, Problem, Unavailable
from fedpai.bench.rows import CACHES, Result, Row, common, results_of
from fedpai.bench.timing import Call, Effort, Timing, interleave
from fedpai.bench.work import DIRECTIONS, passes_of, work_of
from fedpai_kernels.structure import Block, describe

MASK_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        models: networks by name, CSV files of layers, or "transformer".
        densities: share of the weights that is kept, of each layer ("uniform") or of the network.
        mask: "uniform", or another kind of :func:`fedpai.bench.masks.network_masks`.
        structure: of the masks; a name of :mod:`fedpai_kernels.structure`.
        batch: images.
        directions: of :data:`fedpai.bench.work.DIRECTIONS`.
        rivals: of :data:`fedpai.bench.rivals.RIVALS`.
        patterns: which layers; none for all.
        kinds: "conv2d", "linear".
        compiled: dense torch compiled as well.
        cold: empty the caches before every sample.
        effort: how long to measure.
        mask_data: images for criteria that score with them.
        device: what to measure on; rivals other than dense torch compute on the CPU alone.
    """

    models: Sequence[str]
    densities: Sequence[float]
    mask: str = "uniform"
    structure: str = "weight"
    batch: int = 64
    directions: Sequence[str] = ("forward", "input-grad", "weight-grad", "train")
    rivals: Sequence[str] = DEFAULT_RIVALS
    patterns: Sequence[str] = ()
    kinds: Sequence[str] = ("conv2d",)
    compiled: bool = False
    cold: bool = False
    effort: Effort = field(default_factory=Effort)
    mask_data: str = bench_masks.SCORING_DATA
    device: Device = field(default_factory=cpu)


@dataclass(frozen=True)
class Group:
    """One layer with its masks by target density; measured together, as they share the dense rival."""

    model: str
    case: LayerCase
    masks: Mapping[float, Tensor]


def prepare(settings: Settings) -> list[Group]:
    """What there is to measure.

    Raises:
        BenchError: an unknown name, a file that is no layer list, no layer left, or a structure that none can have.
    """
    _check_names(settings)
    bench_masks.check_kind(settings.mask)
    found = []
    for model in settings.models:
        cases = layers_named(model)
        if settings.mask == "uniform":
            for case in select(merged(cases), settings.patterns, settings.kinds):
                masks = {
                    d: bench_masks.uniform_mask(
                        case.weight_shape, d, MASK_SEED, structure=settings.structure, groups=case.groups
                    )
                    for d in settings.densities
                }
                found.append(Group(Path(model).stem, case, masks))
        else:
            found += _by_criterion(model, select(cases, settings.patterns, settings.kinds), settings)
    if not found:
        raise BenchError(f"--layers: no layer of {', '.join(settings.models)} matches")
    block = bench_masks.check_structure(settings.structure)
    if isinstance(block, Block) and not any(_has_room(group.case, block) for group in found):
        raise BenchError(f"--structure {block}: the block is larger than every layer that is measured")
    return found


def _has_room(case: LayerCase, block: Block) -> bool:
    return case.out_channels // case.groups >= block.rows and case.in_channels // case.groups >= block.columns


def _by_criterion(model: str, cases: Sequence[LayerCase], settings: Settings) -> list[Group]:
    """Every layer has a mask of its own, so layers of equal sizes stay apart."""
    from fedpai import models

    if model.endswith(".csv") or model == TRANSFORMER:
        raise BenchError(f"--mask {settings.mask}: needs a network, and {model} is a list of layers")
    network = models.create(model, seed=MASK_SEED)
    masks = {
        density: bench_masks.network_masks(
            network,
            settings.mask,
            1 - density,
            structure=settings.structure,
            data=settings.mask_data,
            seed=MASK_SEED,
        )[0]
        for density in settings.densities
    }
    return [Group(model, case, {d: found[case.name] for d, found in masks.items()}) for case in cases]


def measure(
    settings: Settings,
    work: Sequence[Group],
    machine: MachineModel,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Measures layer after layer; yields one row for each density and direction of a layer.

    Args:
        settings: how.
        work: what, of :func:`prepare`.
        machine: for the bounds.
        progress: told what is being measured.
    """
    start = settings.device.start_of(common("layer", identity(), machine.to_json()))
    for number, group in enumerate(work, 1):
        label = f"{group.model} {group.case.name} ({group.case.label})"
        bench = _Bench(group, settings)
        for direction in settings.directions:
            progress(f"[{number}/{len(work)}] {label}: {direction}")
            timings = bench.time(direction)
            for density in group.masks:
                yield bench.row(start, density, direction, timings, machine)


class _Bench:
    """The contenders of one group, checked and ready."""

    def __init__(self, group: Group, settings: Settings) -> None:
        self.group, self.settings = group, settings
        self.contenders: dict[tuple[float, str, str], Contender] = {}
        self.errors: dict[tuple[float, str, str], float] = {}
        self.reasons: dict[tuple[float, str], tuple[str, str]] = {}
        self.setup: dict[float, Row] = {}
        self.problems: dict[float, Problem] = {}
        first: Problem | None = None
        for density, mask in group.masks.items():
            if first is None:
                problem = first = Problem.make(
                    group.case, settings.batch, mask, compiled=settings.compiled, place=settings.device.place,
                    dtype=settings.device.dtype,
                )  # fmt: skip
            else:
                problem = first.with_mask(mask)
            self.problems[density] = problem
            self.setup[density] = _setup_times(problem, settings.device)
            for name in ("ours", *settings.rivals):
                self._add(density, name, problem)

    def _key(self, density: float, name: str) -> float:
        """Dense torch does not depend on the mask: it is measured once for all densities."""
        return next(iter(self.group.masks)) if name == "dense" else density

    def _add(self, density: float, name: str, problem: Problem) -> None:
        if self._key(density, name) != density:
            return
        try:
            variants = CONTENDERS[name](problem)
        except Unavailable as reason:
            self.reasons[density, name] = ("unavailable", str(reason))
            return
        wrong = []
        for contender in variants:
            try:
                error = contender.error(problem)
            except RuntimeError as failure:
                wrong.append(f"{contender.variant}: {str(failure).splitlines()[0]}")
                continue
            if error > self.settings.device.tolerance:
                wrong.append(f"{contender.variant}: wrong by {error:.1e} of the largest entry")
            else:
                self.contenders[density, name, contender.variant] = contender
                self.errors[density, name, contender.variant] = error
        if wrong:
            self.reasons[density, name] = ("wrong", "; ".join(wrong))

    def time(self, direction: str) -> dict[tuple[float, str, str], Timing]:
        """One direction of all contenders, interleaved."""
        effort = self.settings.device.effort(self.settings.effort, self.settings.cold)
        calls: dict[tuple[float, str, str], Call] = {
            key: contender.calls[direction]
            for key, contender in self.contenders.items()
            if direction in contender.calls
        }
        return interleave(calls, effort, lambda key: key[:2])

    def row(
        self,
        start: Row,
        density: float,
        direction: str,
        timings: Mapping[tuple[float, str, str], Timing],
        machine: MachineModel,
    ) -> Row:
        """One line of the results."""
        case, settings, problem = self.group.case, self.settings, self.problems[density]
        work = work_of(case, problem.mask, settings.batch, direction)
        limits: Row = {"bound_ms": None}
        if not settings.device.facts:
            bound = machine.bound(*passes_of(case, problem.mask, settings.batch, direction))
            limits = {
                "bound_ms": round(1e3 * bound.seconds, 6),
                "roofline": {**bound.to_json(), "traffic_bytes": work.traffic},
            }
        return {
            **start,
            "model": self.group.model,
            "mask": settings.mask,
            "structure": settings.structure,
            "structure_found": describe(problem.mask, case.groups),
            "density": round(problem.plan.density, 6),
            "batch": settings.batch,
            "layer": case.name,
            "label": case.label,
            "count": case.count,
            "case": {k: v for k, v in asdict(case).items() if k not in ("name", "count")},
            "target_density": density,
            "nnz": problem.plan.nnz,
            "direction": direction,
            "caches": CACHES[settings.cold],
            "useful_flop": work.useful_flop,
            "dense_flop": work.dense_flop,
            **limits,
            "choice": _choice(problem),
            "setup": self.setup[density],
            **results_of({name: self._result(density, name, timings) for name in ("ours", *settings.rivals)}),
        }

    def _result(self, density: float, name: str, timings: Mapping[tuple[float, str, str], Timing]) -> Result:
        key = self._key(density, name)
        found = {variant: t for (d, n, variant), t in timings.items() if (d, n) == (key, name)}
        status, reason = self.reasons.get((key, name), ("unavailable", ""))
        if not found and not reason:
            reason = "computes both gradients in one sweep only"
        details: dict[str, dict[str, Any]] = {
            variant: {"error": float(f"{self.errors[key, name, variant]:.2e}")} for variant in found
        }
        return Result(found, details, status, reason)


def _setup_times(problem: Problem, device: Device) -> Row:
    """Milliseconds to compile the mask, and of the first forward and backward pass, which lays it out for
    the image size.
    """
    start = time.perf_counter()
    _ = problem.plan
    compiled = time.perf_counter()
    (contender,) = CONTENDERS["ours"](problem)
    first = device.seconds(contender.calls["train"], 1)
    return {"plan_ms": round(1e3 * (compiled - start), 3), "first_ms": round(1e3 * first, 3)}


def _choice(problem: Problem) -> str:
    """The kernel that a conversion would take for this layer."""
    from fedpai_kernels.nn import LayerInfo, choose_kernel
    from fedpai_kernels.tuning import break_evens

    case = problem.case
    kind = "linear" if case.kind == "linear" else "conv2d"
    info = LayerInfo(kind, case.weight_shape, problem.plan.nnz, case.groups, case.stride)  # type: ignore[arg-type]
    return choose_kernel(info, break_evens()).kernel


def _check_names(settings: Settings) -> None:
    """Raises a BenchError for a direction, rival or kind that is unknown."""
    for option, names, known in (
        ("--directions", settings.directions, DIRECTIONS),
        ("--rivals", settings.rivals, RIVALS),
        ("--kinds", settings.kinds, ("conv2d", "linear")),
    ):
        for name in names:
            if name not in known:
                raise BenchError(f"{option}: unknown name {name!r}, expected one of {', '.join(known)}")
    settings.device.check_rivals(settings.rivals)
