# SPDX-License-Identifier: Apache-2.0
"""Who merges what clients send: this project's means of packed vectors, the loops over dense state_dicts, and copies.

A call's values lie where they are merged before it is timed, and so does what a server makes once for a set of masks:
positions on the CPU, on a CUDA device :class:`fedpai_kernels.cuda.Positions`. Weights are numbers on the CPU; on the
device they lie beside the values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedpai.bench.device import Device
from fedpai.bench.timing import Call
from fedpai.federation.aggregate import masked_mean, weighted_mean
from fedpai.federation.layout import Floats, Layout, MaskSet, Places, places, union, unpack
from fedpai_kernels import aggregate, cuda

SEED = 0
State = dict[str, Tensor]


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


# ---- ours -----------------------------------------------------------------------------------------------


def ours(task: Task, clients: int, device: Device) -> tuple[Call, Call]:
    """What a server calls to merge the first so many clients; and the same with compensated sums."""
    return _ours_on_cuda(task, clients, device.place) if device.facts else _ours_on_cpu(task, clients)


def _ours_on_cpu(task: Task, clients: int) -> tuple[Call, Call]:
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


def _ours_on_cuda(task: Task, clients: int, place: torch.device) -> tuple[Call, Call]:
    """One launch each: of the matrix [clients, values] under a shared mask, else of all values and their places."""
    weights = torch.tensor(task.examples[:clients], dtype=torch.float64, device=place)
    values = all_values(task, clients, place)
    if not task.personal:
        rows = values.view(clients, -1)
        merge = partial(cuda.weighted_mean, rows, weights)
    else:
        at = [torch.from_numpy(task.places_of(client)).to(place) for client in range(clients)]
        old = torch.from_numpy(task.old).to(place)
        merge = partial(cuda.masked_mean, old, values, cuda.Positions(at, old.numel()), weights)
    return merge, partial(merge, compensated=True)


def all_values(task: Task, clients: int, place: torch.device) -> Tensor:
    """Those of the first so many clients, one client behind the other."""
    return torch.from_numpy(np.concatenate(task.vectors[:clients])).to(place)


# ---- loops over dense state_dicts -----------------------------------------------------------------------


def state_dicts(task: Task, clients: int, distinct: int, place: torch.device) -> dict[str, Call]:
    """The loops over dense tensors there, `distinct` state_dicts taking turns as those of so many clients."""
    states = [_dense(task, task.vectors[client], task.mask_of(client), place) for client in range(distinct)]
    turns = [(n, client % distinct) for client, n in enumerate(task.examples[:clients])]
    if not task.personal:
        clients_of = [(n, states[turn]) for n, turn in turns]
        return {"multiply": lambda: mean_multiply(clients_of), "in place": lambda: mean_in_place(clients_of)}
    old = _dense(task, task.old, task.whole, place)
    kept = [_kept(task.masks[client], place) for client in range(distinct)]
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


def _dense(task: Task, packed: Floats, mask: MaskSet, place: torch.device) -> State:
    ints = np.zeros(task.layout.int_count, np.int64)
    state = task.layout.scatter(unpack(packed, mask, task.layout), ints)
    return {key: tensor.to(place) for key, tensor in state.items() if tensor.is_floating_point()}


def _kept(mask: MaskSet, place: torch.device) -> State:
    return {f"{name}.weight": flags.float().to(place) for name, flags in mask.masks().items()}


# ---- copies ---------------------------------------------------------------------------------------------


def copies(source: Tensor, dest: Tensor, threads: int | None) -> dict[str, Call]:
    """Copies of a whole float32 buffer: by torch, and by the C library with so many threads (None: it cannot)."""
    calls: dict[str, Call] = {"torch": lambda: dest.copy_(source)}
    if threads is not None:
        calls["memmove"] = _memmove(source, dest, threads)
    return calls


def _memmove(source: Tensor, dest: Tensor, threads: int) -> Call:
    pool = ThreadPoolExecutor(threads)
    cuts = [source.numel() * part // threads for part in range(threads + 1)]

    def piece(part: int) -> None:
        begin, size = 4 * cuts[part], 4 * (cuts[part + 1] - cuts[part])
        ctypes.memmove(dest.data_ptr() + begin, source.data_ptr() + begin, size)

    return lambda: list(pool.map(piece, range(threads)))
