# SPDX-License-Identifier: Apache-2.0
"""Modules whose parameters lie on a CUDA device, as fake tensors: where results lie, which ops are called, and that
nothing of the host's gets among them. What is computed there, and gradients, need a GPU (tests/cuda)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedpai_kernels as fk
from fedpai_kernels.nn import MaskedConv2d, MaskedLinear, PackedWeight, SparseConv2d, SparseLinear
from fedpai_kernels.nn.packed import is_dispatched

KINDS = {"conv": (SparseConv2d, MaskedConv2d), "fc": (SparseLinear, MaskedLinear)}
MASKS = {"conv": torch.arange(6 * 36).view(6, 4, 3, 3) % 3 == 0, "fc": torch.arange(5 * 6).view(5, 6) % 2 == 0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Ops(TorchDispatchMode):
    """Names of the ops of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fedpai":
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def like(t: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(t.shape, dtype=t.dtype, device="cuda")


def there(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """As if by ``model.cuda()`` and a first step, which takes the plans along."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            indices = like(module.plan.indices, mode)
            module.plan._streams.indices_on[indices.device] = indices
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                if t is not None:
                    moved = like(t, mode)
                    is_parameter = isinstance(t, nn.Parameter)
                    registry[name] = nn.Parameter(moved, t.requires_grad) if is_parameter else moved  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True], ids=["sparse", "masked"])
def test_layers_go_to_the_dispatcher(masked: bool, dtype: torch.dtype, fake: FakeTensorMode) -> None:
    dense = {"conv": nn.Conv2d(4, 6, 3, padding=1), "fc": nn.Linear(6, 5)}
    shapes = {"conv": (3, 4, 8, 8), "fc": (3, 6)}
    for name, module in dense.items():
        layer = there(KINDS[name][masked].from_dense(module, MASKS[name].clone()), fake)
        with fake, torch.no_grad(), Ops() as ops:
            y = layer(torch.empty(shapes[name], dtype=dtype, device="cuda"))
        assert ops.seen == ["fedpai::conv2d_forward"]
        assert (y.device.type, y.dtype) == ("cuda", dtype)
        assert fk.is_batch_last(y)


def test_other_dtypes_of_masked_layers_are_dense(fake: FakeTensorMode) -> None:
    for dtype in (torch.float64, torch.float16):
        layer = there(MaskedLinear.from_dense(nn.Linear(6, 5).to(dtype), MASKS["fc"].clone()), fake)
        with fake, torch.no_grad(), Ops() as ops:
            assert layer(torch.empty(3, 6, dtype=dtype, device="cuda")).dtype == dtype
        assert ops.seen == []


@pytest.mark.parametrize("kind", [SparseLinear, MaskedLinear])
def test_autocast(kind: type[Any], fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """To bfloat16, which the kernels take beside float32 weights, as torch's layers do. Under autocast to float16 a
    sparse layer computes in float32, and a masked one is torch's."""
    layer = there(kind.from_dense(nn.Linear(6, 5), MASKS["fc"].clone()), fake)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    with fake, torch.no_grad(), Ops() as ops:
        x = torch.empty(3, 6, device="cuda")
        assert layer(x).dtype == torch.bfloat16
    assert ops.seen == ["fedpai::conv2d_forward"]
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert not is_dispatched(x, layer.values)
    if kind is SparseLinear:
        with fake, torch.no_grad():
            assert layer(x.half()).dtype == torch.float32


def test_a_converted_model(fake: FakeTensorMode) -> None:
    net = Net()
    fk.sparsify_(net, MASKS)
    there(net, fake)
    net.eval()
    with fake, torch.no_grad(), Ops() as ops:
        assert net(torch.empty(3, 4, 8, 8, device="cuda")).device.type == "cuda"
        state = net.state_dict()
    assert ops.seen == ["fedpai::conv2d_forward"] * 2
    assert {t.device.type for t in state.values()} == {"cuda"}
    assert state["conv.weight"].shape == (6, 4, 3, 3)
    assert [row.directions for row in fk.report(net)] == [(), ()]


def test_conversion_on_a_device_decides_as_on_the_cpu() -> None:
    """The class matters on the CPU only, and a model may come back."""
    from fedpai_kernels.nn.convert import _choice
    from fedpai_kernels.tuning import BUILT_IN

    plan = fk.Plan.from_mask(MASKS["conv"])
    weight = torch.zeros(6, 4, 3, 3)
    expected = _choice(nn.Conv2d(4, 6, 3), plan, weight, BUILT_IN)
    with FakeTensorMode():
        for dtype, same in ((torch.float32, True), (torch.float64, False)):
            there_ = torch.empty(6, 4, 3, 3, dtype=dtype, device="cuda")
            got = _choice(nn.Conv2d(4, 6, 3), plan, there_, BUILT_IN)
            assert (got == expected) is same
    assert got.reason == "no sparse kernel for torch.float64 on a CUDA device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
def test_norms_are_ours_where_the_kernels_are(
    kernels: bool, dtype: torch.dtype, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fk.cuda, "is_available", lambda: kernels)
    norm = there(fk.nn.BatchLastBatchNorm2d(6).eval(), fake)
    with torch.no_grad(), fake, Ops() as ops:
        x = torch.empty(6, 4, 4, 3, dtype=dtype, device="cuda").permute(3, 0, 1, 2)
        y = norm(x)
    assert (y.device.type, y.dtype, y.shape) == ("cuda", dtype, x.shape)
    assert any("batch_norm" in name for name in ops.seen) == kernels
