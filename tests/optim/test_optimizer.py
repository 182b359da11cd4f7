# SPDX-License-Identifier: Apache-2.0
"""The fused optimisers as torch optimisers: state, schedulers, hooks, groups, and what changes in between."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels import _C
from tests.optim.steps import CASES, leaves, makers

STATEFUL = ["sgd_all", "sgd_dampening", "adam_amsgrad", "adamw"]


@pytest.fixture
def none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything must be stepped by the kernels."""

    def refuse(self: Any, group: dict[str, Any]) -> None:
        raise AssertionError("left to torch")

    for kind in (fk.optim.SGD, fk.optim.Adam):
        monkeypatch.setattr(kind, "_step_by_torch", refuse)


def descending(name: str) -> tuple[str, dict[str, Any]]:
    """A case that does not run away in training."""
    kind, options = CASES[name]
    return kind, options | {"maximize": False}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)
    )
    return layers.to(memory_format=torch.channels_last)


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()


def assert_alike(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("none_left")
def test_trains_as_torch_does(name: str) -> None:
    kind, options = descending(name)
    ours, torchs = makers(kind)
    a, b = network(), network()
    train(a, ours(a.parameters(), **options), 6)
    train(b, torchs(b.parameters(), **options), 6)
    assert_alike(a, b)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.usefixtures("none_left")
def test_state_goes_to_torch_and_back(name: str, fused: bool) -> None:
    """Ours, torch's, ours in turn, each from the other's state dict, against torch's throughout."""
    kind, options = descending(name)
    ours, torchs = makers(kind)
    a, b = network(), network()
    first = ours(a.parameters(), **options)
    train(a, first, 2, seed=0)
    second = torchs(a.parameters(), **options, fused=fused)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.param_groups[0]["fused"] = fused
    train(a, second, 2, seed=1)
    third = ours(a.parameters(), lr=1.0)
    third.load_state_dict(pickle.loads(pickle.dumps(second.state_dict())))
    train(a, third, 2, seed=2)
    reference = torchs(b.parameters(), **options)
    for seed in range(3):
        train(b, reference, 2, seed=seed)
    assert_alike(a, b)
    mine, other = third.state_dict(), reference.state_dict()
    assert mine["state"].keys() == other["state"].keys()
    for key, state in mine["state"].items():
        assert state.keys() == other["state"][key].keys()
    assert [group.keys() for group in mine["param_groups"]] == [
        group.keys() for group in other["param_groups"]
    ]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", STATEFUL)
def test_copies_go_on_alike(name: str, duplicate: Callable[[Any], Any]) -> None:
    kind, options = CASES[name]
    model = network()
    optimiser = makers(kind)[0](model.parameters(), **options)
    train(model, optimiser, 2)
    other_model, other = duplicate((model, optimiser))
    assert type(other) is type(optimiser)
    for each, its in ((model, optimiser), (other_model, other)):
        train(each, its, 2, seed=5)
    for x, y in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()


def test_schedulers() -> None:
    a, b = network(), network()
    for model, module in ((a, fk.optim), (b, torch.optim)):
        optimiser = module.SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps = torch.optim.lr_scheduler.StepLR(optimiser, 2, gamma=0.1)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=10)  # moves the momentum too
        for seed in range(5):
            train(model, optimiser, 1, seed)
            (steps if seed < 3 else cycle).step()
    assert_alike(a, b)


def test_hooks_and_closure() -> None:
    (p,) = leaves([torch.ones(3)])
    optimiser = fk.optim.SGD([p], lr=1.0)
    seen = []
    optimiser.register_step_pre_hook(lambda *_: seen.append("before"))
    optimiser.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append("closure")
        optimiser.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimiser.step(closure) == 3.0
    assert seen == ["before", "closure", "after"]
    assert p.tolist() == [0.0, 0.0, 0.0]
    assert optimiser.step() is None


@pytest.mark.usefixtures("none_left")
def test_groups() -> None:
    """Options of their own, a group added later, an option changed, tensors of both types."""
    values = [torch.randn(5), torch.randn(3, 4, dtype=torch.float64), torch.randn(33)]
    results = []
    for module in (fk.optim, torch.optim):
        p, q, r = leaves(values)
        groups = [{"params": [p], "weight_decay": 0.1, "amsgrad": True}, {"params": [q], "lr": 0.3}]
        optimiser = module.Adam(groups, lr=0.1)
        for step in range(4):
            for each in (p, q, r):
                each.grad = torch.full_like(each, step + 0.5)
            if step == 2:
                optimiser.add_param_group({"params": [r], "betas": (0.5, 0.5)})
                optimiser.param_groups[0]["lr"] = 0.02
            optimiser.step()
        results.append([p, q, r])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.usefixtures("none_left")
def test_what_changes_between_steps(name: str) -> None:
    """Gradients that come and go, parameters and buffers that are moved, frozen, replaced or reset."""
    kind, options = CASES[name]
    values = [torch.randn(6, 4), torch.randn(50), torch.randn(9)]
    results = []
    for make in makers(kind):
        p, q, r = leaves(values)
        optimiser = make([p, q, r], **options)
        for step in range(9):
            generator = torch.Generator().manual_seed(step)
            for each in (p, q, r):
                each.grad = torch.randn(each.shape, generator=generator)
            if step % 3 == 1:
                q.grad = None
            if step == 3:
                p.data = p.data.clone()  # elsewhere
            if step == 4:
                r.requires_grad_(False)  # it has a gradient all the same
            if step == 5:
                for key, value in optimiser.state[p].items():
                    optimiser.state[p][key] = value * 1
            if step == 6:
                optimiser.state.pop(q)
            if step == 7:
                fresh = nn.Parameter(torch.ones(7))
                fresh.grad = torch.ones(7)
                optimiser.param_groups[0]["params"][2] = fresh
            optimiser.step()
        results.append([p, q, r, optimiser.param_groups[0]["params"][2]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_autograd_sees_the_change(kind: str) -> None:
    p, q = leaves([torch.randn(4), torch.randn(4)])
    loss = (p * q).sum()
    before = p._version
    p.grad = torch.ones(4)
    makers(kind)[0]([p, q], lr=0.1).step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_of_python() -> None:
    """Optimisers of their own, stepped at once."""

    def work(index: int, results: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(index)
        params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (40000, 3, 700)]
        optimiser = (
            fk.optim.AdamW(params, lr=0.01) if index % 2 else fk.optim.SGD(params, lr=0.01, momentum=0.9)
        )
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimiser.step()
        results[index] = [p.detach() for p in params]

    together: dict[int, list[Tensor]] = {}
    alone: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=work, args=(index, together)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        work(index, alone)
        assert all(torch.equal(a, b) for a, b in zip(alone[index], together[index], strict=True))


@pytest.mark.usefixtures("none_left")
def test_sparse_network() -> None:
    """Packed values, norms and biases of a converted network."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    masks = {"0": torch.rand(8, 3, 3, 3) < 0.3, "4": torch.rand(5, 288) < 0.1}
    fk.sparsify_(a, masks)
    b = copy.deepcopy(a)
    train(a, fk.optim.SGD(a.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 5)
    train(b, torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 5)
    assert_alike(a, b)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {"lr": -1.0}),
        ("SGD", {"nesterov": True}),
        ("Adam", {"betas": (1.0, 0.9)}),
        ("AdamW", {"eps": -1.0}),
    ],
)
def test_refuses_what_torch_refuses(kind: str, options: dict[str, Any]) -> None:
    messages = []
    for make in makers(kind):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages are compared
            make(leaves([torch.ones(2)]), **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("exchange", [None, 3, "capsule"])
def test_reader_refuses_what_is_no_capsule(exchange: object) -> None:
    with pytest.raises(ValueError, match="exchange: expected a capsule"):
        _C.TensorReader(exchange, (Tensor,))


def test_torch_without_exchange_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so, and steps right."""
    monkeypatch.setattr(fk.optim, "_READER", None)
    (p,) = leaves([torch.ones(3)])
    p.grad = torch.ones(3)
    optimiser = fk.optim.SGD([p], lr=0.5)
    with pytest.warns(UserWarning, match="__dlpack_c_exchange_api__"):
        optimiser.step()
    assert p.tolist() == [0.5, 0.5, 0.5]
