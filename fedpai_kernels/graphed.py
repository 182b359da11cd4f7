# SPDX-License-Identifier: Apache-2.0
"""A whole training step without launches: forward, loss, backward and optimiser, captured in a CUDA graph and replayed.

    step = fedpai_kernels.graphed_step(model, optimizer, loss_fn, (inputs, targets))
    for inputs, targets in batches:
        loss = step(inputs, targets)

A small or sparse layer runs for less time than Python and the driver need to launch it. A graph is launched once.

What a graph holds are addresses and numbers. So whatever the captured step read must lie where it lay: at each replay
parameters, buffers, optimiser state, plans and hyper-parameters are compared with those of the capture, on the host,
and one that is another is an error. And what the step decides must not depend on data: one of the steps before the
capture is watched operation by operation, and the next must be the same operations.

The steps before the capture (on the stream of the capture, where autograd then expects the gradients) choose kernels,
copy plans and allocate the optimiser's state; afterwards parameters, buffers, state and the generator of random numbers
are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .nn.packed import PackedWeight

__all__ = ["GraphedStep", "graphed_step"]

_aten: Any = torch.ops.aten

LossFunction = Callable[[Any, Tensor], Tensor]
Step = Callable[[], Tensor]


def graphed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction, example: tuple[Tensor, Tensor]
) -> GraphedStep:
    """Captures ``loss_fn(model(inputs), targets)``, its backward pass and a step of the optimiser in a CUDA graph.

    Model, optimiser and generators are left as they were, but for gradients, which are cleared. The graph goes with
    the returned object. Whatever Python does besides (hooks, prints, branches on anything but data) happens at the
    capture and never again. Dropout draws new numbers in each replay, those that eager steps would draw.

    Args:
        model: all parameters and buffers on one CUDA device; in the mode (train or eval) that the steps are to have.
        optimizer: of the model's parameters: SGD of torch or this package, or one made with ``capturable=True``.
            Learning rates and other numbers are captured; one that is to change must be a tensor on the device.
        loss_fn: from the model's result and the targets to a scalar. What it reads besides must stay where it is.
        example: inputs and targets of the shapes, dtypes and device that all steps will have; any strides.

    Returns:
        ``step(inputs, targets)``: one training step; see :class:`GraphedStep`.

    Raises:
        TypeError: no module, no optimiser, or an example that is no pair of tensors.
        ValueError: tensors that are not on one CUDA device; an optimiser that cannot be captured, has state yet to
            begin in its own way, or holds none of the model's parameters; a loss that is no scalar with gradients;
            an operation whose result decides what is computed next (``.item()``, ``nonzero``, masks as indexes), or
            that copies between devices; a step that does other operations each time.
        RuntimeError: called under autocast that caches weights, or what the model itself raises.
    """
    return GraphedStep(model, optimizer, loss_fn, example, CudaRecorder())


# ---- recording --------------------------------------------------------------------------------------------------


class Recorder(Protocol):
    """What captures a step and replays it."""

    device_type: str

    def rehearsing(self, device: torch.device) -> Any:
        """A context for steps before the capture; random numbers drawn in it are drawn again."""

    def capture(self, step: Step) -> tuple[Callable[[], None], Tensor]:
        """What replays the step, and the tensor that then holds its result. The step may or may not be run."""


class CudaRecorder:
    """A :class:`Recorder` by a CUDA graph, on a stream of its own."""

    device_type = "cuda"

    @contextmanager
    def rehearsing(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            drawn = torch.cuda.get_rng_state(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                torch.cuda.current_stream(device).wait_stream(self._stream)
                torch.cuda.set_rng_state(drawn, device)

    def capture(self, step: Step) -> tuple[Callable[[], None], Tensor]:
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device), torch.cuda.graph(graph, stream=self._stream):
            result = step()
        return graph.replay, result


class _Watch(TorchDispatchMode):
    """Notes every operation, and refuses those after which the host would have to look at data."""

    _DECIDING: Final = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    _INDEXING: Final = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
    _COPYING: Final = {_aten._to_copy.default, _aten.copy_.default}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        decides = bool(self._DECIDING.intersection(func.tags))
        if func in self._INDEXING:  # integers select as many as they are
            decides = any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if decides:
            raise ValueError(f"model, loss_fn or optimizer: {func} looks at data, which a captured step cannot")
        result = func(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Elsewhere a number on the host is an argument of the kernel.
        places = {t.device for t in tensors if func in self._COPYING or t.device.type != "cpu" or t.dim() > 0}
        if len(places) > 1:
            raise ValueError(
                f"model, loss_fn or optimizer: {func} copies between {' and '.join(sorted(map(str, places)))}, which a "
                "captured step cannot; keep everything on one device"
            )
        self.seen.append(str(func))
        return result


# ---- the step ---------------------------------------------------------------------------------------------------


class GraphedStep:
    """A captured training step; made by :func:`graphed_step`.

    ``step(inputs, targets)`` copies both to where the captured step reads them and replays it, on torch's current
    stream, without waiting. It returns the loss, a new tensor of no dimensions without gradients. Each parameter's
    `grad` is that of the latest step, until somebody clears it.

    Raises:
        TypeError, ValueError: inputs or targets of another shape, dtype or device than the example's.
        RuntimeError: the model, its masks, the optimiser's state or a hyper-parameter is not the one that was
            captured; make another step then.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction,
        example: tuple[Tensor, Tensor], recorder: Recorder,
    ) -> None:  # fmt: skip
        device = _checked_device(model, optimizer, example, recorder.device_type)
        _check_optimizer(model, optimizer)
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            raise RuntimeError(
                "graphed_step: autocast keeps cast weights from step to step, which a graph would never cast again; "
                "use autocast inside the model, or with cache_enabled=False"
            )
        self._model, self._optimizer = model, optimizer
        inputs, targets = self._buffers = tuple(t.detach().clone() for t in example)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(inputs), targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"loss_fn: expected a scalar that depends on the model's parameters, got {loss!r}")
            loss.backward()
            optimizer.step()
            return loss.detach().reshape(())

        with torch.enable_grad():
            _rehearse(model, optimizer, step, recorder, device)
            self._replay, self._loss = recorder.capture(step)
        self._captured = _what_is_read(model, optimizer)
        self._changed = [*model.parameters(), *model.buffers()]

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for name, given, buffer in zip(("inputs", "targets"), (inputs, targets), self._buffers, strict=True):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
            for what in ("shape", "dtype", "device"):
                mine, theirs = getattr(buffer, what), getattr(given, what)
                if mine != theirs:
                    shown = (tuple(mine), tuple(theirs)) if what == "shape" else (mine, theirs)
                    raise ValueError(f"{name}: the captured step has {what} {shown[0]}, got {shown[1]}")
        self._check_unchanged()
        for buffer, given in zip(self._buffers, (inputs, targets), strict=True):
            buffer.copy_(given.detach(), non_blocking=True)
        self._replay()
        increment_version(self._changed)
        return self._loss.clone()

    def _check_unchanged(self) -> None:
        now = _what_is_read(self._model, self._optimizer)
        if now == self._captured:
            return
        every = {**self._captured, **now}
        names = [" ".join(map(str, key)) for key in every if self._captured.get(key) != now.get(key)]
        raise RuntimeError(
            f"graphed_step: {', '.join(names[:3])}{' and others' * (len(names) > 3)}: not what was captured, and a "
            "replay would go on with the old; make the step again with graphed_step"
        )


def _rehearse(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, recorder: Recorder, device: torch.device
) -> None:
    """Three steps, two of them watched; then everything is as it was, but that the optimiser's state is there."""
    begun = {p: {name: v for name, v in state.items() if v is not None} for p, state in optimizer.state.items()}
    of_state = [t for state in begun.values() for t in tree_leaves(state) if isinstance(t, Tensor)]
    kept = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers(), *of_state)]
    watches = _Watch(), _Watch()
    succeeded = False
    try:
        with recorder.rehearsing(device):
            step()
            new = _new_state(optimizer, begun)
            for watch in watches:
                with watch:
                    step()
        if watches[0].seen != watches[1].seen:
            raise ValueError("model, loss_fn or optimizer: two steps did other operations; a captured step cannot")
        succeeded = True
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if succeeded:
                for t in new:
                    t.zero_()
            else:
                optimizer.state.clear()
                optimizer.state.update(begun)
            for t, before in kept:
                t.copy_(before)


def _new_state(optimizer: torch.optim.Optimizer, begun: Mapping[Any, Mapping[str, Any]]) -> list[Tensor]:
    """What a first step has made.

    Raises:
        ValueError: it may not begin at zero, so that steps from zeros would be others than steps from nothing.
    """
    new: list[Tensor] = []
    for p, state in optimizer.state.items():
        made = {name: value for name, value in state.items() if value is not None and name not in begun.get(p, {})}
        new += [t for t in tree_leaves(made) if isinstance(t, Tensor)]
    dampened = any(group.get("dampening", 0) != 0 for group in optimizer.param_groups)
    if new and (dampened or not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam))):
        raise ValueError(
            f"optimizer: the first step of {type(optimizer).__name__} with these settings is another computation than "
            "later ones; take one step before graphed_step"
        )
    return new


# ---- what must stay ---------------------------------------------------------------------------------------------


def _what_is_read(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[Any, ...], Any]:
    """What a captured step has taken for given, by words that name it: addresses, plans, modes, numbers."""
    found: dict[tuple[Any, ...], Any] = {}
    for name, module in model.named_modules():
        found["module", name, "mode"] = module.training
        if isinstance(module, PackedWeight):
            found["module", name, "mask"] = module.plan.handle
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                found["module", name, key] = t.data_ptr()
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                found["optimizer: group", number, key] = _constant(value)
        for place, p in enumerate(group["params"]):
            found["optimizer: group", number, "parameter", place] = p.data_ptr()
            for key, value in optimizer.state.get(p, _NOTHING).items():
                address = value.data_ptr() if isinstance(value, Tensor) else value
                found["optimizer: group", number, "parameter", place, key] = address
    return found


_NOTHING: Final[dict[str, Any]] = {}


def _constant(value: Any) -> Any:
    """A hyper-parameter: a tensor on the device is where it lies, anything else what it is."""
    if isinstance(value, Tensor):
        return value.tolist() if value.is_cpu else value.data_ptr()
    return tuple(map(_constant, value)) if isinstance(value, (tuple, list)) else value


# ---- checks -----------------------------------------------------------------------------------------------------


def _checked_device(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: tuple[Tensor, Tensor], device_type: str
) -> torch.device:
    """The one device of everything."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    is_pair = isinstance(example, (tuple, list)) and len(example) == 2
    if not is_pair or not all(isinstance(t, Tensor) for t in example):
        raise TypeError("example: expected a pair of tensors, inputs and targets")
    places: dict[str, Tensor] = {f"parameter {name!r}": p for name, p in model.named_parameters()}
    if not places:
        raise ValueError("model: it has no parameters")
    places.update({f"buffer {name!r}": b for name, b in model.named_buffers()})
    device = next(iter(places.values())).device
    for name, t in places.items():
        if t.device.type != device_type or t.device != device:
            raise ValueError(
                f"model: {name} is on {t.device}, expected one CUDA device for all; a step on the CPU launches nothing"
            )
    for name, t in zip(("inputs", "targets"), example, strict=True):
        if t.device != device:
            raise ValueError(f"example: the {name} are on {t.device}, the model on {device}")
    return device


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise ValueError("optimizer: differentiable=True keeps a graph of its steps, which cannot be captured")
        if "capturable" in group and not group["capturable"]:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} counts its steps on the host; make it with capturable=True"
            )
        if "capturable" not in group and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} cannot be captured; take SGD, or one with capturable=True"
            )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "optimizer: it holds none of the model's parameters; make it after sparsify_, which makes new ones"
        )
