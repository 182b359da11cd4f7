# SPDX-License-Identifier: Apache-2.0
"""A converted model in use: training, checkpointing, threads, copies, torch.compile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fedpai_kernels as fk
from tests.nn.small import train

pytestmark = pytest.mark.usefixtures("dense_from_eight_tenths")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.mix = nn.Conv2d(12, 16, 1, stride=2)
        self.last = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.pool(self.relu1(self.norm1(self.conv1(x)))))
        return self.head(self.last(self.mix(x)).flatten(1))


def pair(dtype: torch.dtype = torch.float32) -> tuple[Net, Net, dict[str, Tensor]]:
    """The dense model with masked weights, its converted copy, and the masks."""
    dense = Net().to(dtype)
    density = {"conv1": 0.95, "conv2": 0.15, "mix": 0.3, "head": 0.14}
    masks = {name: torch.rand(dense.get_submodule(name).weight.shape) < d for name, d in density.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_submodule(name).weight.mul_(mask)
    sparse = fk.sparsify(dense, masks, compact=False)
    # The case needs a layer that is left to torch, and one with a mask that it must respect.
    assert isinstance(sparse.conv1, fk.nn.MaskedConv2d)
    return dense, sparse, masks


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Images whose class shows in their brightness."""
    made = []
    for _ in range(count):
        y = torch.randint(0, 5, (10,))
        made.append((torch.randn(10, 3, 12, 12, dtype=dtype) + 3 * y.view(-1, 1, 1, 1), y))
    return made


def test_thirty_steps_in_double() -> None:
    dense, sparse, masks = pair(torch.float64)
    data = batches(30, torch.float64)
    expected, losses = train(dense, data, masks), train(sparse, data)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    state = sparse.state_dict()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-8)
    for name, mask in masks.items():
        assert (state[f"{name}.weight"][~mask] == 0).all()
    dense.eval()
    sparse.eval()
    torch.testing.assert_close(sparse(data[0][0]), dense(data[0][0]), rtol=1e-8, atol=1e-8)


def test_thirty_steps_in_single_drift_as_dense_ones_do() -> None:
    """Against double, the sparse run is as close as a dense run in another memory format is, give or take."""
    dense, sparse, masks = pair()
    data = batches(30)
    exact = copy.deepcopy(dense).double()
    other = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    reference = train(exact, [(x.double(), y) for x, y in data], masks)
    drift = {}
    for name, model, given in (("dense", other, masks), ("sparse", sparse, None)):
        losses = train(model, data, given)
        drift[name] = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    assert drift["sparse"] <= 3 * drift["dense"] + 1e-4


def test_the_same_bits_twice() -> None:
    _, sparse, _ = pair()
    data = batches(5)
    first, second = copy.deepcopy(sparse), copy.deepcopy(sparse)
    assert train(first, data) == train(second, data)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing() -> None:
    _, sparse, _ = pair(torch.float64)
    twin = copy.deepcopy(sparse)
    plain_body = twin.body
    twin.body = lambda x: checkpoint(plain_body, x, use_reentrant=False)  # type: ignore[method-assign]
    x, y = batches(1, torch.float64)[0]
    for model in (sparse, twin):
        F.cross_entropy(model(x), y).backward()
    for a, b in zip(sparse.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_clients_in_threads() -> None:
    """Deep copies that share their plans train at once, each as it would alone."""
    _, sparse, _ = pair()
    shards = [batches(6) for _ in range(4)]
    alone = [copy.deepcopy(sparse) for _ in shards]
    expected = [train(model, data) for model, data in zip(alone, shards, strict=True)]
    together = [copy.deepcopy(sparse) for _ in shards]
    assert all(model.conv2.plan is sparse.conv2.plan for model in together)
    losses: dict[int, list[float]] = {}

    def work(client: int) -> None:
        torch.set_num_threads(torch.get_num_threads())
        losses[client] = train(together[client], shards[client])

    threads = [threading.Thread(target=work, args=(client,)) for client in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [losses[client] for client in range(len(shards))] == expected
    for a, b in zip(alone, together, strict=True):
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(p, q)


def test_gradients_of_gradients() -> None:
    dense, sparse, masks = pair(torch.float64)
    x, y = batches(1, torch.float64)[0]
    norms = []
    for model in (dense, sparse):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        name_of = {id(p): n for n, p in model.named_parameters()}
        kept = [
            g[masks[name_of[id(p)].removesuffix(".weight")]]
            if name_of[id(p)].removesuffix(".weight") in masks
            else g
            for p, g in zip(parameters, grads, strict=True)
        ]
        sum(g.pow(2).sum() for g in kept).backward()
        norms.append({name_of[id(p)]: p.grad for p in parameters})
    for name, grad in norms[1].items():
        layer = name.removesuffix(".values")
        expected = norms[0][f"{layer}.weight"][masks[layer]] if layer != name else norms[0][name]
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-9)


def test_frozen_layers_and_no_grad() -> None:
    _, sparse, _ = pair()
    x, y = batches(1)[0]
    sparse.conv2.requires_grad_(False)
    F.cross_entropy(sparse(x), y).backward()
    assert sparse.conv2.values.grad is None
    assert sparse.conv1.values.grad is not None
    with torch.no_grad():
        assert not sparse(x).requires_grad
    with torch.inference_mode():
        sparse.eval()(x)


def test_per_client_function_call() -> None:
    _, sparse, _ = pair()
    x, _ = batches(1)[0]
    moved = {name: p.detach() * 2 for name, p in sparse.named_parameters()}
    expected = copy.deepcopy(sparse)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.copy_(moved[name])
    assert torch.equal(torch.func.functional_call(sparse, moved, (x,)), expected(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str) -> None:
    _, sparse, _ = pair()
    torch._dynamo.reset()
    twin = copy.deepcopy(sparse)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for x, y in batches(2):
        outputs = []
        for model, call in ((sparse, sparse), (twin, compiled)):
            model.zero_grad()
            out = call(x)
            F.cross_entropy(out, y).backward()
            outputs.append(out.detach())
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(twin.parameters(), sparse.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(twin.buffers(), sparse.buffers(), strict=True):
        torch.testing.assert_close(a, b)
