# SPDX-License-Identifier: Apache-2.0
"""On a GPU: dense candidates against float64, choices by measured times, models that move there, captured steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from tests.cases import CONV2D, LINEAR, Case
from tests.checking import differentiate, operands, stacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fk.cuda.is_available(), reason="no GPU, or no libfedpai_cuda.so"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.down, self.drop, self.fc = nn.Conv2d(32, 64, 3, 2, 1), nn.Dropout(0.3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(torch.relu(self.down(x)).mean((2, 3))))


def sparse_net() -> Net:
    net = Net()
    masks = {name: torch.rand_like(getattr(net, name).weight) < 0.1 for name in ("conv", "down", "fc")}
    fk.sparsify_(net, masks)
    return net.cuda()


@pytest.mark.parametrize("case", [*CONV2D, *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_dense_is_exact(case: Case) -> None:
    """Small integers: exact in TF32 too, with sums that are exact in float32."""
    given = operands(case, "f32", "exact")
    if case.longest_sum * 16 >= 2**24:
        pytest.skip("its sums are not exact in float32")
    expected = differentiate(case.dense, given.to(torch.float64))
    on_gpu = type(given)(*(None if t is None else t.cuda() for t in given))
    with fk.dispatch.backend("dense"):
        got = differentiate(case.sparse, on_gpu)
    for name, value, truth in zip(got._fields, got, expected, strict=True):
        assert (value is None) == (truth is None)
        if value is not None and truth is not None:
            torch.testing.assert_close(value.cpu(), truth.float(), rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("case", CONV2D[::5], ids=lambda case: case.name)
def test_dense_is_exact_for_clients(case: Case) -> None:
    clients = [operands(case, "f32", "exact", client) for client in range(3)]
    given = stacked(clients)
    with fk.dispatch.backend("dense"):
        got = differentiate(case.sparse, type(given)(*(None if t is None else t.cuda() for t in given)))
    for client, own in enumerate(clients):
        expected = differentiate(case.dense, own.to(torch.float64))
        for name, value, truth in zip(got._fields, got, expected, strict=True):
            assert (value is None) == (truth is None)
            if value is not None and truth is not None:
                torch.testing.assert_close(value[client].cpu(), truth.float(), rtol=1e-6, atol=0, msg=name)


def test_choices_are_measured_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDPAI_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    net = sparse_net()
    net(torch.randn(64, 3, 32, 32, device="cuda")).sum().backward()
    rows = fk.report(net)["down"].directions
    assert {row.direction for row in rows} == {"forward", "input_grad", "weight_grad"}
    assert all("us against" in row.reason for row in rows)
    assert len(list((tmp_path / "fedpai").iterdir())) == 1


def test_a_model_moves_there_and_back() -> None:
    net = sparse_net()
    assert all(t.is_cuda for t in net.state_dict().values())
    assert net.conv.mask.is_cuda
    net.load_state_dict(copy.deepcopy(net).cpu().state_dict())
    net(torch.randn(4, 3, 8, 8, device="cuda")).sum().backward()
    net.cpu()(torch.randn(4, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["SGD", "torch SGD", "Adam", "torch Adam"])
def test_replays_are_eager_steps(kind: str, backend: str) -> None:
    """To the bit, dropout included, where the kernels are deterministic."""
    module = torch.optim if kind.startswith("torch") else fk.optim
    adam = kind.endswith("Adam")
    options = {"lr": 0.01, "capturable": True} if adam else {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
    nets = [sparse_net()]
    nets.append(copy.deepcopy(nets[0]))
    pairs = [(net, getattr(module, kind.split()[-1])(net.parameters(), **options)) for net in nets]
    data = [
        (torch.randn(32, 3, 16, 16, device="cuda"), torch.randint(0, 10, (32,), device="cuda")) for _ in range(4)
    ]
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with fk.dispatch.backend(backend):
            step = fk.graphed_step(*pairs[1], F.cross_entropy, data[0])
            torch.cuda.manual_seed(6)
            expected = []
            for x, y in data:
                pairs[0][1].zero_grad()
                loss = F.cross_entropy(pairs[0][0](x), y)
                loss.backward()
                pairs[0][1].step()
                expected.append(loss.detach())
            torch.cuda.manual_seed(6)
            got = [step(x, y) for x, y in data]
    finally:
        torch.backends.cudnn.deterministic = deterministic
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for own, other in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_a_changed_mask_is_refused() -> None:
    net = sparse_net()
    batch = torch.randn(8, 3, 8, 8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    step = fk.graphed_step(net, fk.optim.SGD(net.parameters(), lr=0.1), F.cross_entropy, batch)
    step(*batch)
    fk.sparsify_(net, {"conv": ~net.conv.mask})
    with pytest.raises(RuntimeError, match="conv mask"):
        step(*batch)


def test_merging_and_steps_come_here_by_themselves() -> None:
    vectors = torch.randn(3, 1000, device="cuda")
    merged = fk.aggregate.weighted_mean(list(vectors), [1.0, 2.0, 3.0])
    assert torch.equal(merged.cpu(), fk.aggregate.weighted_mean(list(vectors.cpu()), [1.0, 2.0, 3.0]))
    p, q = nn.Parameter(torch.ones(5, device="cuda")), nn.Parameter(torch.ones(5))
    p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
    for parameter in (p, q):
        fk.optim.Adam([parameter], lr=0.1).step()
    torch.testing.assert_close(p.cpu(), q.detach(), rtol=1e-6, atol=0, check_device=False)
