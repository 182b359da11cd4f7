# SPDX-License-Identifier: Apache-2.0
"""Captured steps: equal to eager ones, and refused where a replay would go wrong. The device is the CPU, and a recorder
that runs the step again stands in for CUDA's; what only a GPU shows is in tests/cuda/test_dispatch_gpu.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.graphed import GraphedStep


class CpuRecorder:
    """Replays by running the step."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captured = 0

    @contextmanager
    def rehearsing(self, device: torch.device) -> Iterator[None]:
        drawn = torch.get_rng_state()
        yield
        torch.set_rng_state(drawn)

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        result = torch.zeros(())

        def replay() -> None:
            result.copy_(step())

        return replay, result


class Net(nn.Module):
    """Everything that changes in a step: weights, running statistics, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


MASKS = {"conv": torch.arange(8 * 27).view(8, 3, 3, 3) % 3 == 0, "fc": torch.arange(4 * 128).view(4, 128) % 5 == 0}
class TensorAdam(torch.optim.Adam):
    """What torch computes with capturable=True, which it does on a GPU only: nothing by numbers of the host."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** state["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                p.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "fk_sgd": lambda p: fk.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: TensorAdam(p, lr=0.01, capturable=True),
}


def made(optimiser: str = "sgd_momentum") -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Net()
    fk.sparsify_(net, MASKS)
    return net, OPTIMISERS[optimiser](net.parameters())


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(5, 3, 4, 4, generator=generator), torch.randint(0, 4, (5,), generator=generator)) for _ in range(n)
    ]


def graphed_on_cpu(
    net: nn.Module, optimiser: Any, loss_fn: Any = F.cross_entropy, example: Any = None, recorder: Any = None
) -> GraphedStep:
    example = batches(1)[0] if example is None else example
    return GraphedStep(net, optimiser, loss_fn, example, recorder or CpuRecorder())


def contents(net: nn.Module, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    state = [t for p in net.parameters() for t in optimiser.state.get(p, {}).values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers(), *state)]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_replays_are_eager_steps(name: str, begun: bool) -> None:
    """From the first one on: the steps before the capture leave nothing behind, with or without state before them."""
    eager, captured = made(name), made(name)
    data = batches(4)

    def eager_step(net: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()
        return loss.detach()

    if begun:
        for pair in (eager, captured):
            torch.manual_seed(5)
            eager_step(*pair, *data[0])
    step = graphed_on_cpu(*captured, example=data[1])
    torch.manual_seed(6)
    expected = [eager_step(*eager, *batch) for batch in data]
    torch.manual_seed(6)
    got = [step(*batch) for batch in data]
    assert all(map(torch.equal, got, expected)), "each loss is a tensor of its own"
    assert all(map(torch.equal, contents(*captured), contents(*eager)))
    assert all(p.grad is not None for p in captured[0].parameters())


def test_numbers_drawn_before_the_capture_are_drawn_again() -> None:
    net, optimiser = made()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    graphed_on_cpu(net, optimiser)
    assert torch.equal(torch.rand(3), expected)


def test_later_operands_are_checked() -> None:
    net, optimiser = made()
    step = graphed_on_cpu(net, optimiser)
    before = contents(net, optimiser)
    x, y = batches(1)[0]
    for operands, error, message in [
        ((x[:3], y), ValueError, r"inputs: the captured step has shape \(5, 3, 4, 4\), got \(3, 3, 4, 4\)"),
        ((x.double(), y), ValueError, r"inputs: the captured step has dtype torch.float32, got torch.float64"),
        ((x.to("meta"), y), ValueError, r"inputs: the captured step has device cpu, got meta"),
        ((x, y.int()), ValueError, r"targets: the captured step has dtype torch.int64, got torch.int32"),
        ((x, 3), TypeError, r"targets: expected a tensor, got int"),
    ]:
        with pytest.raises(error, match="^" + message):
            step(*operands)
    assert all(map(torch.equal, contents(net, optimiser), before))


def remask(net: Any, optimiser: Any) -> None:
    fk.sparsify_(net, {"conv": MASKS["conv"].flip(0)})


def replace_state(net: Any, optimiser: Any) -> None:
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))


CHANGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "mask": (remask, "module conv mask"),
    "dense": (lambda net, _: fk.densify_(net), "module conv"),
    "moved": (lambda net, _: setattr(net.fc.values, "data", net.fc.values.data.clone()), "module fc values"),
    "buffer": (lambda net, _: setattr(net.norm, "running_mean", torch.zeros(8)), "module norm running_mean"),
    "mode": (lambda net, _: net.norm.eval(), "module norm mode"),
    "new module": (lambda net, _: setattr(net, "more", nn.Linear(2, 2)), "module more mode"),
    "rate": (lambda _, optimiser: optimiser.param_groups[0].update(lr=0.2), "optimizer: group 0 lr"),
    "state": (replace_state, "optimizer: group 0 parameter 0 momentum_buffer"),
    "group": (
        lambda _, optimiser: optimiser.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "optimizer: group 1",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_the_capture_is_named(change: str) -> None:
    net, optimiser = made()
    step = graphed_on_cpu(net, optimiser)
    step(*batches(1)[0])
    alter, named = CHANGES[change]
    alter(net, optimiser)
    before = contents(net, optimiser)
    with pytest.raises(RuntimeError, match=rf"^graphed_step: .*{named}.*make the step again"):
        step(*batches(1)[0])
    assert all(map(torch.equal, contents(net, optimiser), before))


def test_loading_weights_in_place_is_no_change() -> None:
    net, optimiser = made()
    step = graphed_on_cpu(net, optimiser)
    step(*batches(1)[0])
    net.load_state_dict(net.state_dict())
    step(*batches(1)[0])


class Deciding(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.calls = how, nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.calls += 1
        if self.how == "item" and y.sum().item() > 1e9:
            return y * 2
        if self.how == "mask":
            return y[y > -1e9].reshape(y.shape)
        if self.how == "nonzero":
            return y[x.nonzero()[:, 0].clamp(max=0)]
        if self.how == "put":
            y = y.clone()
            y[x > 1e9] = 0.0
            return y
        if self.how == "elsewhere":
            return y + y.to("meta").shape[0]
        if self.how == "number elsewhere":
            return y + y.sum().to("meta").dim()
        if self.how == "each time" and self.calls % 2:
            return y * 2
        if self.how == "index":
            return y[torch.zeros(2, dtype=torch.int64)]
        return y


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("item", r"_local_scalar_dense.* looks at data"),
        ("mask", r"index.* looks at data"),
        ("nonzero", r"nonzero.* looks at data"),
        ("put", r"index_put_.* looks at data"),
        ("elsewhere", r"_to_copy.* copies between cpu and meta"),
        ("number elsewhere", r"_to_copy.* copies between cpu and meta"),
        ("each time", r"two steps did other operations"),
    ],
)
def test_control_by_data_is_refused(how: str, message: str) -> None:
    model = Deciding(how)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, recorder = contents(model, optimiser), CpuRecorder()
    example = torch.randn(3, 4), torch.zeros(())
    with pytest.raises(ValueError, match=r"^model, loss_fn or optimizer: .*" + message):
        graphed_on_cpu(model, optimiser, lambda y, t: y.square().sum(), example, recorder)
    assert recorder.captured == 0
    assert all(map(torch.equal, contents(model, optimiser), before))
    assert not optimiser.state, "what the steps before had made is gone"


def test_control_by_indexes_is_not_refused() -> None:
    model = Deciding("index")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphed_on_cpu(model, optimiser, lambda y, t: y.square().sum(), (torch.randn(3, 4), torch.zeros(())))
    assert step(torch.randn(3, 4), torch.zeros(())).shape == ()


X, Y = torch.ones(2, 3), torch.zeros(2, 2)


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    given: dict[str, Any] = {"model": nn.Linear(3, 2), "loss_fn": F.mse_loss, "example": (X, Y), **changes}
    if "optimizer" not in given:
        given["optimizer"] = lambda p: torch.optim.SGD(p, lr=0.1)
    if callable(given["optimizer"]):
        given["optimizer"] = given["optimizer"](given["model"].parameters())
    with pytest.raises(error, match="^" + message):
        graphed_on_cpu(given["model"], given["optimizer"], given["loss_fn"], given["example"])


def test_what_cannot_be_captured_is_refused() -> None:
    refused(TypeError, "model: expected a torch.nn.Module, got function", model=lambda x: x, optimizer=3)
    refused(TypeError, "optimizer: expected a torch.optim.Optimizer, got int", optimizer=3)
    refused(TypeError, "example: expected a pair of tensors", example=(X, 3))
    refused(TypeError, "example: expected a pair of tensors", example=X)
    refused(ValueError, "example: the targets are on meta, the model on cpu", example=(X, Y.to("meta")))
    refused(ValueError, "optimizer: Adam counts its steps on the host.*capturable=True", optimizer=torch.optim.Adam)
    refused(ValueError, "optimizer: LBFGS cannot be captured", optimizer=torch.optim.LBFGS)
    refused(ValueError, "optimizer: Adagrad cannot be captured", optimizer=torch.optim.Adagrad)
    differentiable = torch.optim.SGD([nn.Parameter(X)], lr=0.1, differentiable=True)
    refused(ValueError, "optimizer: differentiable=True", optimizer=differentiable)
    other = nn.Linear(3, 2)
    refused(
        ValueError, "optimizer: it holds none of the model's parameters",
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
    )  # fmt: skip
    dampened = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    refused(ValueError, "optimizer: the first step of SGD .* take one step", model=other, optimizer=dampened)
    assert not dampened.state
    refused(ValueError, "loss_fn: expected a scalar that depends", loss_fn=lambda y, t: y)
    refused(ValueError, "loss_fn: expected a scalar that depends", loss_fn=lambda y, t: y.sum().detach())
    half = nn.Linear(3, 2)
    half.register_buffer("elsewhere", torch.ones(1, device="meta"))
    refused(ValueError, "model: buffer 'elsewhere' is on meta, expected one CUDA device", model=half)


def test_dampening_after_a_first_step() -> None:
    model = nn.Linear(3, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    F.mse_loss(model(X), Y).backward()
    optimiser.step()
    graphed_on_cpu(model, optimiser, F.mse_loss, (X, Y))(X, Y)


def test_a_model_on_the_cpu_is_refused() -> None:
    net, optimiser = made()
    message = r"^model: parameter 'conv.values' is on cpu.*a step on the CPU launches nothing"
    with pytest.raises(ValueError, match=message):
        fk.graphed_step(net, optimiser, F.cross_entropy, batches(1)[0])


def test_autocast_that_caches_is_refused() -> None:
    net, optimiser = made()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="cache_enabled=False"):
        graphed_on_cpu(net, optimiser)


