# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench aggregate`: merging what clients send, packed, against a loop over dense state_dicts.

Two forms: "shared", the weighted mean under one mask for all, and "personal", the masked mean under masks that the
clients draw independently, with the density that `--mask` gives each layer (so they overlap as little as masks can).

The rival is the loop that federated averaging usually is, tensor by tensor in float32, in two variants: "multiply", the
formula as one writes it, and "in place", with torch's fused multiply-and-add into one sum. It sums as many clients, but
has only `distinct` state_dicts in memory, which take turns; that can only help its caches. Clients' packed vectors are
all distinct.

A row has ``copy``: copying all clients' values into one buffer, by as many threads, timed in the same rounds; and
``copy_share``: the bytes that ours must move (``bytes``: values and positions read, the result written, with personal
masks the old model read) per second of ours, over the bytes that the fastest copy reads and writes per second.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpai.bench import masks as bench_masks
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.rows import Result, Row, common, results_of
from fedpai.bench.step import check_networks, network_of
from fedpai.bench.timing import Call, Effort, Timing, interleave
from fedpai.federation.aggregate import masked_mean, weighted_mean
from fedpai.federation.layout import Floats, Layout, MaskSet, Places, pack, places, union, unpack
from fedpai_kernels import aggregate

FORMS = ("shared", "personal")
SEED = 0
State = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        models: networks of :mod:`fedpai.models`, by name.
        sparsities: shares of the weights that are removed.
        mask: "uniform", or another criterion or allocation of :func:`fedpai.pruning.criteria`.
        mask_data: images for criteria that score with them.
        forms: of :data:`FORMS`.
        clients: how many are merged.
        distinct: state_dicts of the rival that exist.
        effort: how long to measure.
    """

    models: Sequence[str]
    sparsities: Sequence[float]
    mask: str = "uniform"
    mask_data: str = bench_masks.SCORING_DATA
    forms: Sequence[str] = FORMS
    clients: int = 100
    distinct: int = 10
    effort: Effort = field(default_factory=Effort)


def prepare(settings: Settings) -> None:
    """Raises a BenchError for a model, mask or form that is unknown, or a sparsity that keeps nothing."""
    bench_masks.check_kind(settings.mask)
    for name in settings.forms:
        if name not in FORMS:
            raise BenchError(f"--form: unknown name {name!r}, expected one of {', '.join(FORMS)}")
    check_networks(settings.models, settings.sparsities)


def measure(
    settings: Settings, machine: MachineModel, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Measures network after network; yields one row for each sparsity and form.

    Args:
        settings: what.
        machine: recorded in the rows.
        progress: told what is being measured.
    """
    start = common("aggregate", identity(), machine.to_json())
    for model in settings.models:
        for sparsity in settings.sparsities:
            progress(f"{model}, {settings.mask} {sparsity:g}: masks")
            network = network_of(model, seed=SEED)
            found, data = bench_masks.network_masks(
                network, settings.mask, sparsity, data=settings.mask_data, seed=SEED
            )
            base = MaskSet.from_masks(Layout.of(network), found)
            for form in settings.forms:
                progress(f"{model}, {settings.mask} {sparsity:g}: {form}")
                setting = {"model": model, "sparsity": sparsity, "mask": settings.mask, "mask_data": data}
                yield {**start, **setting, "batch": None, **_measure(settings, base, form)}


@dataclass
class Task:
    """What is to be merged.

    Attributes:
        layout: of the network.
        personal: whether every client has a mask of its own.
        masks: of the clients; one, if it is shared.
        whole: what the global model keeps.
        old: the global model, packed.
        vectors: what the clients send, packed.
        examples: n_k.
    """

    layout: Layout
    personal: bool
    masks: list[MaskSet]
    whole: MaskSet
    old: Floats
    vectors: list[Floats]
    examples: list[int]

    @classmethod
    def make(cls, base: MaskSet, form: str, clients: int) -> Task:
        """Random values under the mask, or under masks of each client's own that keep as many weights of each layer."""
        layout, rng, personal = base.layout, np.random.default_rng(SEED), form == "personal"
        masks = [_redrawn(base, rng) for _ in range(clients)] if personal else [base]
        whole = union(masks)
        old, *vectors = (
            rng.standard_normal(layout.float_count(mask), np.float32)
            for mask in (whole, *(masks if personal else masks * clients))
        )
        examples = [int(n) for n in rng.integers(100, 1000, clients)]
        return cls(layout, personal, masks, whole, old, vectors, examples)

    def mask_of(self, client: int) -> MaskSet:
        """The mask of a client."""
        return self.masks[client if self.personal else 0]

    def places_of(self, client: int) -> Places:
        """Where a client's values lie in the global model."""
        tail = np.arange(self.whole.kept, self.old.size, dtype=np.int32)
        return np.concatenate((places(self.mask_of(client), self.whole), tail))


def _redrawn(base: MaskSet, rng: np.random.Generator) -> MaskSet:
    """A random mask that keeps as many weights of each layer."""
    parts = [
        slot.offset + np.sort(rng.choice(slot.size, where.stop - where.start, replace=False, shuffle=False))
        for slot, where in base.parts()
    ]
    return MaskSet.from_positions(base.layout, np.concatenate(parts))


# ---- contenders -----------------------------------------------------------------------------------------


def ours(task: Task, clients: int) -> tuple[Call, Call]:
    """The federation's merge of the first so many clients; and the same with compensated sums."""
    vectors, examples = task.vectors[:clients], task.examples[:clients]
    if not task.personal:
        return (
            lambda: weighted_mean(vectors, examples),
            lambda: aggregate.weighted_mean(vectors, examples, compensated=True),
        )
    at = [task.places_of(client) for client in range(clients)]
    return (
        lambda: masked_mean(task.old, vectors, at, examples),
        lambda: aggregate.masked_mean(task.old, vectors, at, examples, compensated=True),
    )


def state_dicts(task: Task, clients: int, distinct: int) -> dict[str, Call]:
    """The loops over dense tensors, `distinct` state_dicts taking turns as those of so many clients."""
    states = [_dense(task, task.vectors[client], task.mask_of(client)) for client in range(distinct)]
    turns = [(n, client % distinct) for client, n in enumerate(task.examples[:clients])]
    if not task.personal:
        clients_of = [(n, states[turn]) for n, turn in turns]
        return {"multiply": lambda: mean_multiply(clients_of), "in place": lambda: mean_in_place(clients_of)}
    old = _dense(task, task.old, task.whole)
    kept = [_kept(task, task.masks[client]) for client in range(distinct)]
    masked = [(n, states[turn], kept[turn]) for n, turn in turns]
    return {
        "multiply": lambda: masked_multiply(old, masked),
        "in place": lambda: masked_in_place(old, masked),
    }


def mean_multiply(clients: Sequence[tuple[int, State]]) -> State:
    """``sum_k n_k w_k / sum_k n_k``, written down."""
    total = sum(n for n, _ in clients)
    return {key: torch.as_tensor(sum(n * state[key] for n, state in clients)) / total for key in clients[0][1]}


def mean_in_place(clients: Sequence[tuple[int, State]]) -> State:
    """The same in one sum."""
    total, merged = sum(n for n, _ in clients), {}
    for key, first in clients[0][1].items():
        merged[key] = torch.zeros_like(first)
        for n, state in clients:
            merged[key].add_(state[key], alpha=n)
        merged[key].div_(total)
    return merged


def masked_multiply(old: State, clients: Sequence[tuple[int, State, State]]) -> State:
    """``sum_k n_k m_k w_k / sum_k n_k m_k``, the old value where no client keeps it, written down."""
    merged = mean_multiply([(n, {key: w for key, w in state.items() if key not in kept}) for n, state, kept in clients])
    for key in clients[0][2]:
        top = torch.as_tensor(sum(n * kept[key] * state[key] for n, state, kept in clients))
        bottom = torch.as_tensor(sum(n * kept[key] for n, _, kept in clients))
        merged[key] = torch.where(bottom > 0, top / bottom, old[key])
    return merged


def masked_in_place(old: State, clients: Sequence[tuple[int, State, State]]) -> State:
    """The same in two sums; dropped weights are zeros, so they need not be masked again."""
    merged = mean_in_place([(n, {key: w for key, w in state.items() if key not in kept}) for n, state, kept in clients])
    for key in clients[0][2]:
        top, bottom = torch.zeros_like(old[key]), torch.zeros_like(old[key])
        for n, state, kept in clients:
            top.add_(state[key], alpha=n)
            bottom.add_(kept[key], alpha=n)
        merged[key] = torch.where(bottom > 0, top.div_(bottom), old[key])
    return merged


def copies(source: Tensor, dest: Tensor, threads: int) -> dict[str, Call]:
    """Copies of a whole float32 buffer, by torch and by the C library."""
    pool = ThreadPoolExecutor(threads)
    cuts = [source.numel() * part // threads for part in range(threads + 1)]

    def piece(part: int) -> None:
        begin, size = 4 * cuts[part], 4 * (cuts[part + 1] - cuts[part])
        ctypes.memmove(dest.data_ptr() + begin, source.data_ptr() + begin, size)

    return {"torch": lambda: dest.copy_(source), "memmove": lambda: list(pool.map(piece, range(threads)))}


def _dense(task: Task, packed: Floats, mask: MaskSet) -> State:
    ints = np.zeros(task.layout.int_count, np.int64)
    state = task.layout.scatter(unpack(packed, mask, task.layout), ints)
    return {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}


def _kept(task: Task, mask: MaskSet) -> State:
    return {f"{name}.weight": flags.float() for name, flags in mask.masks().items()}


# ---- measurement ----------------------------------------------------------------------------------------


def _measure(settings: Settings, base: MaskSet, form: str) -> Row:
    clients, distinct = settings.clients, min(settings.distinct, settings.clients)
    task = Task.make(base, form, clients)
    problems = _problems(task, distinct)
    plain, compensated = ours(task, clients)
    calls: dict[tuple[str, str], Call] = {("ours", "float64"): plain, ("compensated", "float64"): compensated}
    dense = state_dicts(task, clients, distinct)
    calls |= {("state_dict", name): call for name, call in dense.items() if name not in problems}
    values = torch.from_numpy(np.concatenate(task.vectors))
    copied = copies(values, torch.empty_like(values), torch.get_num_threads())
    calls |= {("copy", name): call for name, call in copied.items()}
    timings = interleave(calls, settings.effort, lambda key: key[0])
    of = {
        contender: {name: timing for (whose, name), timing in timings.items() if whose == contender}
        for contender in ("ours", "compensated", "state_dict", "copy")
    }
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    results = {
        "ours": Result(of["ours"], {}),
        "compensated": Result(of["compensated"], {}),
        "state_dict": Result(of["state_dict"], {}, "wrong", reason),
    }
    moved = 4 * (values.numel() + task.old.size)
    if task.personal:
        moved += 4 * (values.numel() + task.old.size)
    return {
        "form": form,
        "density": round(base.density, 6),
        "clients": clients,
        "distinct": distinct,
        "values": values.numel(),
        "union": task.whole.kept,
        "bytes": moved,
        "copy": {"bytes": 8 * values.numel(), **{name: timing.to_json() for name, timing in of["copy"].items()}},
        "copy_share": round(_rate(moved, of["ours"]) / _rate(8 * values.numel(), of["copy"]), 4),
        **results_of(results),
    }


def _rate(moved: int, timings: Mapping[str, Timing]) -> float:
    return moved / min(timing.median for timing in timings.values())


def _problems(task: Task, distinct: int) -> dict[str, str]:
    """Which of the rival's variants do not merge the first `distinct` clients as ours does."""
    merged: Any = ours(task, distinct)[0]()
    problems = {}
    for name, call in state_dicts(task, distinct, distinct).items():
        state: Any = call()
        state |= {slot.key: torch.zeros(slot.shape, dtype=torch.int64) for slot in task.layout.ints}
        theirs = pack(task.layout.gather(state)[0], task.whole, task.layout)
        error = float(np.abs(theirs - merged).max(initial=0))
        if not error < 1e-4:
            problems[name] = f"differs from ours by up to {error:.1e}"
    return problems
