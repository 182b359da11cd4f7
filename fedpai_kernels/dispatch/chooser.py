# SPDX-License-Identifier: Apache-2.0
"""Which candidate computes a direction of a layer: the fastest one, measured where it runs.

Every candidate that can compute a layer is timed on the operands of the first call, and the fastest serves from then
on. What was chosen is kept in memory for each mask, and the timings in a file for each device, by a description of the
layer that holds for all masks of one shape, density (two digits) and structure: so the next process, and the next
client's mask, need not measure.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cuda.library import CudaUnavailableError
from ..layout import is_batch_last
from ..ops.geometry import Pair, unflatten
from ..plan import Plan
from .candidates import Candidate, precision
from .file import Times
from .timing import Run, Timer

Direction = Literal["forward", "input_grad", "weight_grad"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "input_grad", "weight_grad")


class Memory(Protocol):
    """Where timings are kept: :class:`fedpai_kernels.dispatch.file.TimesFile`."""

    def get(self, device: torch.device, layer: str) -> Times | None: ...
    def put(self, device: torch.device, layer: str, times: Times) -> None: ...


class Call(NamedTuple):
    """One direction of one layer, but for its mask.

    Attributes:
        clients: that share the layer's mask, and the call.
        batch: of each client.
        image: height and width of what the layer reads.
        batch_last: how all images are stored; False: some are not.
        precision: what torch may do to float32.
    """

    direction: Direction
    device: torch.device
    dtype: torch.dtype
    clients: int
    batch: int
    image: Pair
    geometry: tuple[int, ...]
    batch_last: bool
    precision: tuple[str, str]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        images = f"{self.batch} images of {self.image[0]}x{self.image[1]}"
        if self.clients != 1:
            images = f"{self.clients} x {images}"
        return f"{self.direction} of {images} in {dtype} on {self.device}"


@dataclass(frozen=True)
class Choice:
    """What was chosen for a :class:`Call`, and why.

    Attributes:
        candidate: its name.
        times: microseconds by candidate; empty where nothing had to be compared.
        remembered: the times are those of a file.
        unavailable: why the other candidates cannot compute this, by name.
    """

    candidate: str
    times: Times = field(default_factory=dict)
    remembered: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """In one line."""
        others = [f"{name} {time:.3g} us" for name, time in self.times.items() if name != self.candidate]
        parts = [f"{self.times[self.candidate]:.3g} us"] if self.times else []
        parts += [f"against {', '.join(others)}"] if others else ["nothing to compare it with"]
        parts += ["measured before" if self.remembered else "measured"] if others else []
        return "; ".join([" ".join(parts), *(f"no {name}: {why}" for name, why in self.unavailable.items())])


_forced: str | None = None
_forcing = threading.Lock()


class Chooser:
    """Runs each call by the candidate that is fastest at it.

    Args:
        candidates: in the order in which reports name them.
        timer: compares them.
        memory: of timings.
        is_capturing: whether a CUDA graph is being captured on the current stream.
    """

    def __init__(
        self, candidates: Sequence[Candidate], timer: Timer, memory: Memory, is_capturing: Callable[[], bool]
    ) -> None:
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self._timer, self._memory, self._is_capturing = timer, memory, is_capturing
        # By what all plans of a mask share; they go with the last of these.
        self._choices: weakref.WeakKeyDictionary[object, dict[Call, Choice]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._candidates)

    def run(
        self, direction: Direction, plan: Plan, geometry: Sequence[int], image: Pair, images: Sequence[Tensor],
        arguments: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        """Computes one direction of a layer.

        Args:
            image: height and width of what the layer reads.
            images: those among the arguments.
            arguments: of the op.

        Raises:
            RuntimeError: not measured yet, while a CUDA graph is being captured; a forced candidate that cannot
                compute this (or ValueError, TypeError, as that says).
        """
        first = images[0]
        forced = _forced
        if forced is not None:
            candidate = self._candidates[forced]
            candidate.check(plan, first)
            return getattr(candidate, direction)(*arguments)
        call = Call(
            direction, first.device, first.dtype, first.shape[0] if first.dim() == 5 else 1, first.shape[-4], image,
            tuple(geometry), all(map(is_batch_last, images)), precision(),
        )  # fmt: skip
        choices = self._choices.get(plan._streams)
        choice = None if choices is None else choices.get(call)
        if choice is None:
            choice = self._choose(call, plan, first, arguments)
        return getattr(self._candidates[choice.candidate], direction)(*arguments)

    def choices(self, plan: Plan, geometry: Sequence[int] | None = None) -> dict[Call, Choice]:
        """What was chosen so far for the mask of a plan; with a geometry, for layers of that."""
        found = self._choices.get(plan._streams, {})
        return {c: choice for c, choice in found.items() if geometry is None or c.geometry == tuple(geometry)}

    def _choose(self, call: Call, plan: Plan, images: Tensor, arguments: tuple[Any, ...]) -> Choice:
        if self._is_capturing():
            raise RuntimeError(
                f"a layer of shape {plan.mask_shape} has not been measured yet ({call}), and a CUDA graph is being "
                "captured, in which nothing can be measured; run one step with the same shapes before capturing it"
            )
        with self._lock:
            choices = self._choices.setdefault(plan._streams, {})
            if call not in choices:  # another thread may have been here
                choices[call] = self._compared(call, plan, images, arguments)
            return choices[call]

    def _compared(self, call: Call, plan: Plan, images: Tensor, arguments: tuple[Any, ...]) -> Choice:
        unavailable: dict[str, str] = {}
        runs: dict[str, Run] = {}
        for name, candidate in self._candidates.items():
            try:
                candidate.check(plan, images)
            except (RuntimeError, ValueError, TypeError) as error:
                unavailable[name] = str(error)
                if isinstance(error, CudaUnavailableError):
                    warnings.warn(f"masked layers are computed without the CUDA kernels: {error}", stacklevel=2)
            else:
                runs[name] = partial(getattr(candidate, call.direction), *arguments)
        if not runs:
            raise RuntimeError(f"nothing can compute a layer of shape {plan.mask_shape} ({call}): {unavailable}")
        if len(runs) == 1 or images.numel() == 0:
            return Choice(next(iter(runs)), unavailable=unavailable)
        layer = _described(call, plan)
        times = self._memory.get(call.device, layer)
        remembered = times is not None and times.keys() == runs.keys()
        if times is None or not remembered:
            for name in list(runs):
                try:
                    runs[name]()
                except torch.OutOfMemoryError:
                    unavailable[name] = "not enough memory"
                    del runs[name]
            if not runs:
                raise torch.OutOfMemoryError(f"no memory for a layer of shape {plan.mask_shape} ({call})")
            times = dict(zip(runs, self._timer.microseconds(list(runs.values())), strict=True))
            self._memory.put(call.device, layer, times)
        return Choice(min(times, key=times.__getitem__), dict(times), remembered, unavailable)


def _described(call: Call, plan: Plan) -> str:
    """A layer and a call in words that another mask of the same size and structure shares."""
    g = unflatten(list(call.geometry))
    sizes = {
        "weight": plan.mask_shape, "stride": g.stride, "padding": (*g.pad_front, *g.pad_back), "dilation": g.dilation,
        "images": (call.batch, *call.image),
    }  # fmt: skip
    words = [f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items()]
    words += [f"clients {call.clients}"] if call.clients != 1 else []
    words += [f"groups {plan.groups}", f"density {plan.density:.2g}", f"structure {plan.structure}"]
    words += [str(call.dtype).removeprefix("torch."), "batch-last" if call.batch_last else "other storage"]
    return ", ".join([plan.kind, call.direction, *words, f"precision {'/'.join(call.precision)}"])


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Every layer by this candidate until the end of the block, in all threads: autograd has threads of its own."""
    global _forced
    with _forcing:
        before, _forced = _forced, name
    try:
        yield
    finally:
        with _forcing:
            _forced = before
