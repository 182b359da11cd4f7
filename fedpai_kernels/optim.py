# SPDX-License-Identifier: Apache-2.0
"""SGD, Adam and AdamW that step all parameters of a group in one pass over memory.

    optimiser = fedpai_kernels.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

They are torch's own optimisers (:class:`torch.optim.SGD`, :class:`torch.optim.Adam`,
:class:`torch.optim.AdamW`) with another `step`: arguments, parameter groups, schedulers, hooks and state are
torch's, so a state dict of one loads into the other, both ways, and the numbers are the same up to rounding (the
order of operations stands in ``csrc/cpu/optim/kernels-inl.h``). The bits are the same at every number of threads.

One call steps every parameter of a group that is a float32 or float64 tensor in main memory and dense (in
any order of the dimensions), with its gradient and its state stored alike. So is every such float32 parameter on a CUDA
device, in one launch of the kernels of :mod:`fedpai_kernels.cuda`; without those that is an error. Whatever else there
is in a group (half precision, complex numbers, sparse gradients, gradients of other strides, other devices, tensor
subclasses, parameters that share memory) is stepped by torch's own functions in the same call. So are whole
groups with `differentiable` or a hyper-parameter that is a tensor, in main memory those with `capturable`, everything
under `torch.compile`, and everything whose gradients are still scaled. `foreach` and `fused` say which of torch's
functions serves there.

In the capture of a CUDA graph, state must be there already, and Adam needs ``capturable=True``, so that it counts its
steps on the device: :func:`fedpai_kernels.graphed_step` sees to the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from . import _C, cuda

__all__ = ["SGD", "Adam", "AdamW"]


def _tensor_reader() -> _C.TensorReader | None:
    """How the kernels look at tensors; None where torch does not offer it."""
    try:
        return _C.TensorReader(getattr(Tensor, "__dlpack_c_exchange_api__", None), (Tensor, nn.Parameter))
    except ValueError:
        return None


_READER = _tensor_reader()


def _is_on_cuda(p: Tensor) -> bool:
    return p.is_cuda


def _counts_on_device(p: Tensor, step: Tensor) -> bool:
    return step.device == p.device


def _suits_cuda(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter has a gradient, and both are what the CUDA kernels take; its state likewise."""
    grad = p.grad
    if grad is None or type(p) not in (Tensor, nn.Parameter) or type(grad) is not Tensor:
        return False
    alike = [p, grad, *(t for name, t in state.items() if name != "step" and t is not None)]
    if any(t.dtype != torch.float32 or t.layout != torch.strided or t.device != p.device for t in alike):
        return False
    step = state.get("step")
    counts = step is None or not _counts_on_device(p, step) or step.dtype == torch.float32
    return counts and all(t.stride() == p.stride() for t in alike) and cuda.optim.is_dense(p)


def _check_not_capturing(problem: str) -> None:
    """Raises RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{problem}, and a CUDA graph is being captured: take a step before capturing one")


class _Stepping(torch.optim.Optimizer):
    """The `step` that the optimisers share."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned; None without.

        Raises:
            RuntimeError: whatever torch refuses, as torch says it (e.g. Adam with a sparse gradient); in the capture
                of a CUDA graph, state that is not there yet, or is not on the device.
            fedpai_kernels.cuda.CudaUnavailableError: parameters on a CUDA device, but no CUDA kernels or no driver.
        """
        if _READER is None:
            warnings.warn(
                f"fedpai_kernels.optim: torch {torch.__version__} has no Tensor.__dlpack_c_exchange_api__ of DLPack 1; "
                "the steps are torch's own, and slower",
                stacklevel=2,
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for every in self.param_groups:
                group = every if torch.compiler.is_compiling() else self._after_cuda(every)
                if _READER is None or torch.compiler.is_compiling() or self._is_torchs(group):
                    self._step_by_torch(group)
                elif left := self._step_by_kernels(group, _READER):
                    self._step_by_torch({**group, "params": left})
        return loss

    def _after_cuda(self, group: dict[str, Any]) -> dict[str, Any]:
        """Steps what the CUDA kernels can take; the group without that."""
        if not any(map(_is_on_cuda, group["params"])) or self._is_torchs({**group, "capturable": False}):
            return group
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for p in group["params"]:
            if _is_on_cuda(p) and _suits_cuda(p, self.state.get(p, {})):
                by_device.setdefault(p.device, {}).setdefault(p.data_ptr(), p)  # one of those that share memory
        if by_device:
            cuda.library.load()  # says what is missing before anything is touched
        stepped: set[int] = set()
        for params in by_device.values():
            stepped.update(map(id, params.values()))
            self._step_on_cuda(group, list(params.values()))
        return {**group, "params": [p for p in group["params"] if id(p) not in stepped]}

    def _step_on_cuda(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Steps parameters of one device that :func:`_suits_cuda`."""
        raise AssertionError

    def _is_torchs(self, group: dict[str, Any]) -> bool:
        """Whether a group as a whole asks for what only torch does."""
        if group["differentiable"] or group.get("capturable"):
            return True
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return True  # torch.amp.GradScaler leaves unscaling and skipping to the step
        return not all(isinstance(factor, int | float) for factor in self._factors(group))

    def _factors(self, group: dict[str, Any]) -> Iterable[Any]:
        """The hyper-parameters that are numbers."""
        raise AssertionError

    def _step_by_kernels(self, group: dict[str, Any], reader: _C.TensorReader) -> list[Tensor]:
        """Steps what the kernels can take; returns the parameters with a gradient that they cannot."""
        raise AssertionError

    def _step_by_torch(self, group: dict[str, Any]) -> None:
        raise AssertionError


class SGD(_Stepping, torch.optim.SGD):
    """:class:`torch.optim.SGD` in one pass: 20 bytes moved per float32 parameter with momentum, 12 without.

    Arguments, state (`momentum_buffer`) and results are torch's; see the module for what is stepped how.
    """

    def _factors(self, group: dict[str, Any]) -> Iterable[Any]:
        return group["lr"], group["momentum"], group["dampening"], group["weight_decay"]

    def _step_by_kernels(self, group: dict[str, Any], reader: _C.TensorReader) -> list[Tensor]:
        has_momentum = group["momentum"] != 0
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        first: list[bool] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            params.append(p)
            grads.append(grad)
            if has_momentum:
                buffer = self.state[p].get("momentum_buffer")
                first.append(buffer is None)
                buffers.append(torch.empty_like(p) if buffer is None else buffer)
        left = _C.sgd_step(
            reader, params, grads, buffers, first, group["lr"], group["momentum"], group["dampening"],
            group["weight_decay"], group["nesterov"], group["maximize"], torch.get_num_threads(),
        )  # fmt: skip
        if True in first:
            for number in sorted({i for i, new in enumerate(first) if new}.difference(left)):
                self.state[params[number]]["momentum_buffer"] = buffers[number]
        increment_version(params + buffers)
        return [params[number] for number in left]

    def _step_on_cuda(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers: list[Tensor] = []
        first: list[bool] = []
        if group["momentum"] != 0:
            first = [self.state[p].get("momentum_buffer") is None for p in params]
            if any(first):
                _check_not_capturing("momentum is not there yet")
            for p, new in zip(params, first, strict=True):
                buffers.append(torch.empty_like(p) if new else self.state[p]["momentum_buffer"])
        cuda.optim.sgd_step(
            params, [p.grad for p in params if p.grad is not None], buffers, first,
            **{name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")},
        )  # fmt: skip
        for p, buffer in zip(params, buffers, strict=False):  # none without momentum
            self.state[p]["momentum_buffer"] = buffer
        increment_version(params + buffers)

    def _step_by_torch(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        sgd(
            params,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class Adam(_Stepping, torch.optim.Adam):
    """:class:`torch.optim.Adam` in one pass: 28 bytes moved per float32 parameter, 36 with amsgrad.

    Arguments, state (`step`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`) and results are torch's; see the module for
    what is stepped how.
    """

    def _factors(self, group: dict[str, Any]) -> Iterable[Any]:
        return group["lr"], *group["betas"], group["eps"], group["weight_decay"]

    def _step_by_kernels(self, group: dict[str, Any], reader: _C.TensorReader) -> list[Tensor]:
        amsgrad = group["amsgrad"]
        params: list[Tensor] = []
        grads: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        largest: list[Tensor] = []
        steps: list[Tensor] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if not state or grad.is_sparse:  # which torch refuses
                self._init_group({**group, "params": [p]}, [], [], [], [], [], [])
            params.append(p)
            grads.append(grad)
            means.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            if amsgrad:
                largest.append(state["max_exp_avg_sq"])
            steps.append(state["step"])
        beta1, beta2 = group["betas"]
        left = _C.adam_step(
            reader, params, grads, means, squares, largest, steps, group["lr"], beta1, beta2, group["eps"],
            group["weight_decay"], group["decoupled_weight_decay"], amsgrad, group["maximize"],
            torch.get_num_threads(),
        )  # fmt: skip
        increment_version(params + means + squares + largest + steps)
        return [params[number] for number in left]

    def _step_on_cuda(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not all(self.state[p] for p in params):
            _check_not_capturing("state is not there yet")
            for p in params:
                if not self.state[p]:
                    self._init_group({**group, "params": [p]}, [], [], [], [], [], [])
        beta1, beta2 = group["betas"]
        settings = {
            "lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"], "maximize": group["maximize"],
            "weight_decay": group["weight_decay"], "decoupled": group["decoupled_weight_decay"],
        }  # fmt: skip
        on_device = [p for p in params if _counts_on_device(p, self.state[p]["step"])]
        if on_device:
            steps = [self.state[p]["step"] for p in on_device]
            torch._foreach_add_(steps, 1)
            self._adam_step_on_cuda(group, on_device, steps, settings)
        counted: dict[float, list[Tensor]] = {}  # on the host; parameters may have begun at different times
        for p in params:
            step = self.state[p]["step"]
            if not _counts_on_device(p, step):
                _check_not_capturing("steps are counted on the host, without capturable=True")
                step += 1
                counted.setdefault(float(step), []).append(p)
        for number, together in counted.items():
            self._adam_step_on_cuda(group, together, number, settings)

    def _adam_step_on_cuda(
        self, group: dict[str, Any], params: list[Tensor], step: float | list[Tensor], settings: dict[str, Any]
    ) -> None:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        state = [[self.state[p][name] for p in params] for name in names]
        cuda.optim.adam_step(params, [p.grad for p in params if p.grad is not None], *state, step=step, **settings)
        increment_version(params + [t for tensors in state for t in tensors])

    def _step_by_torch(self, group: dict[str, Any]) -> None:
        self._accelerator_graph_capture_health_check()
        params: list[Tensor] = []
        grads: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        largest: list[Tensor] = []
        steps: list[Tensor] = []
        has_complex = self._init_group(group, params, grads, means, squares, largest, steps)
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            means,
            squares,
            largest,
            steps,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` in one pass: :class:`Adam` with decoupled weight decay."""
