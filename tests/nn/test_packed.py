# SPDX-License-Identifier: Apache-2.0
"""What sparse and masked layers share: conversion, the dense face, state dicts, copies, and life as a plain module."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fedpai_kernels as fk
from fedpai_kernels.nn import MaskedConv2d, MaskedLinear, PackedWeight, SparseConv2d, SparseLinear

CLASSES = [SparseConv2d, MaskedConv2d, SparseLinear, MaskedLinear]


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[PackedWeight]:
    return request.param


def dense_for(cls: type[PackedWeight], bias: bool = True) -> nn.Module:
    if cls.dense_type is nn.Conv2d:
        return nn.Conv2d(4, 6, 3, padding=1, bias=bias).double()
    return nn.Linear(7, 5, bias=bias).double()


def mask_for(dense: nn.Module, density: float = 0.3) -> Tensor:
    mask = torch.rand(dense.weight.shape) < density
    mask.view(-1)[3] = True
    return mask


def input_for(dense: nn.Module) -> Tensor:
    shape = (5, 4, 6, 6) if isinstance(dense, nn.Conv2d) else (5, 7)
    return torch.randn(shape, dtype=torch.float64)


def made(cls: type[PackedWeight], bias: bool = True) -> tuple[nn.Module, Tensor, PackedWeight]:
    """A dense layer with zeros outside of the mask, the mask, and the packed layer."""
    dense = dense_for(cls, bias)
    mask = mask_for(dense)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense, mask, cls.from_dense(dense, mask)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_computes_what_the_masked_dense_layer_computes(cls: type[PackedWeight], bias: bool) -> None:
    dense, mask, packed = made(cls, bias)
    x = input_for(dense)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = dense(x1), packed(x2)
    torch.testing.assert_close(y2, y1)
    dy = torch.randn_like(y1)
    y1.backward(dy)
    y2.backward(dy)
    torch.testing.assert_close(x2.grad, x1.grad)
    torch.testing.assert_close(packed.values.grad, dense.weight.grad[mask])
    if bias:
        torch.testing.assert_close(packed.bias.grad, dense.bias.grad)


def test_attributes(cls: type[PackedWeight]) -> None:
    dense, mask, packed = made(cls)
    assert [name for name, _ in packed.named_parameters()] == ["values", "bias"]
    assert packed.values.shape == (int(mask.sum()),)
    assert torch.equal(packed.mask, mask)
    assert packed.mask.dtype == torch.bool
    assert packed.plan == fk.Plan.from_mask(mask)
    assert torch.equal(packed.weight, dense.weight)
    assert f"nnz={packed.plan.nnz}" in repr(packed)
    assert repr(dense).split("(", 1)[1][:-1] in repr(packed)
    for name, value in dense.__dict__.items():
        if not name.startswith("_"):
            assert getattr(packed, name) == value, name


def test_weight_is_a_differentiable_view(cls: type[PackedWeight]) -> None:
    _, mask, packed = made(cls)
    packed.weight.pow(2).sum().backward()
    torch.testing.assert_close(packed.values.grad, 2 * packed.values.detach())
    assert packed.weight[~mask].abs().max() == 0


def test_weight_cannot_be_assigned(cls: type[PackedWeight]) -> None:
    _, mask, packed = made(cls)
    for name in ("weight", "mask"):
        with pytest.raises(AttributeError, match=f"{name} is computed.*set_weight_"):
            setattr(packed, name, nn.Parameter(torch.zeros(mask.shape)))
    before = packed.values.detach().clone()
    packed.set_weight_(2 * packed.weight)
    assert torch.equal(packed.values, 2 * before)
    with pytest.raises(ValueError, match=r"weight: \d+ of its entries outside of the mask are not zero"):
        packed.set_weight_(torch.ones(mask.shape))
    with pytest.raises(ValueError, match="weight: expected shape"):
        packed.set_weight_(torch.ones(2, 2))
    assert torch.equal(packed.values, 2 * before)


def test_from_dense_leaves_the_source_alone(cls: type[PackedWeight]) -> None:
    dense = dense_for(cls)
    calls: list[str] = []
    dense.register_forward_hook(lambda *_: calls.append("hook"))
    before = copy.deepcopy(dense.state_dict())
    packed = cls.from_dense(dense, mask_for(dense))
    with torch.no_grad():
        packed.values.zero_()
        packed.bias.zero_()
    packed.register_forward_hook(lambda *_: calls.append("packed only"))
    dense(input_for(dense))
    assert calls == ["hook"]
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key])


def test_from_dense_finds_the_mask(cls: type[PackedWeight]) -> None:
    dense, mask, _ = made(cls)
    assert torch.equal(cls.from_dense(dense).mask, mask)
    pruned = dense_for(cls)
    prune.custom_from_mask(pruned, "weight", mask)
    packed = cls.from_dense(pruned)
    assert torch.equal(packed.mask, mask)
    assert torch.equal(packed.weight, pruned.weight)
    assert prune.is_pruned(pruned)
    assert not packed._forward_pre_hooks
    full = dense_for(cls)
    assert cls.from_dense(full).mask.all()
    assert torch.equal(cls.from_dense(full, fk.Plan.from_mask(mask)).mask, mask)


def test_to_dense(cls: type[PackedWeight]) -> None:
    _, mask, packed = made(cls)
    packed.requires_grad_(False)
    packed.eval()
    back = packed.to_dense()
    assert type(back) is cls.dense_type
    assert torch.equal(back.weight, packed.weight)
    assert (back.weight[~mask] == 0).all()
    assert not back.training
    assert not back.weight.requires_grad
    x = input_for(back)
    torch.testing.assert_close(back(x), packed(x))
    with torch.no_grad():
        back.weight.zero_()
        back.bias.zero_()
    assert packed.weight.abs().sum() > 0
    assert packed.bias.abs().sum() > 0


# ---- state dict -------------------------------------------------------------------------------------------------


def test_state_dict_goes_both_ways(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    other = dense_for(cls)
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(other.weight, dense.weight)
    assert list(packed.state_dict()) == list(dense.state_dict())
    changed = OrderedDict((k, v * 3) for k, v in dense.state_dict().items())
    values = packed.values
    packed.load_state_dict(changed, strict=True)
    assert packed.values is values  # optimisers keep their parameter
    assert torch.equal(packed.weight, dense.weight * 3)
    assert torch.equal(packed.bias, dense.bias * 3)


def test_state_dict_within_a_model(cls: type[PackedWeight], tmp_path: Any) -> None:
    dense, _, packed = made(cls)
    sparse_model, dense_model = nn.Sequential(nn.ReLU(), packed), nn.Sequential(nn.ReLU(), dense)
    torch.save(sparse_model.state_dict(), tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert list(state) == ["1.weight", "1.bias"]
    dense_model.load_state_dict(state)
    sparse_model.load_state_dict(dense_model.state_dict())


def test_a_checkpoint_of_another_mask_is_refused(cls: type[PackedWeight]) -> None:
    dense, mask, packed = made(cls)
    state = dense.state_dict()
    outside = (~mask).nonzero()[:2]
    for at in outside:
        state["weight"][tuple(at)] = 1.0
    before = packed.values.detach().clone()
    model = nn.ModuleDict({"layer": packed})
    with pytest.raises(RuntimeError, match=r"layer\.weight: 2 of its entries.*a checkpoint of another mask"):
        model.load_state_dict({f"layer.{k}": v for k, v in state.items()})
    assert torch.equal(packed.values, before)
    state["weight"][tuple(outside[0])] = float("nan")
    with pytest.raises(RuntimeError, match="2 of its entries"):
        packed.load_state_dict(state)


def test_missing_unexpected_and_misshapen_keys(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    before = packed.values.detach().clone()
    state = dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        packed.load_state_dict({"bias": state["bias"]})
    result = packed.load_state_dict({"bias": state["bias"], "other": state["bias"]}, strict=False)
    assert result.unexpected_keys == ["other"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "values"'):
        packed.load_state_dict({**state, "values": packed.values.detach()})
    with pytest.raises(RuntimeError, match=r"weight: expected shape"):
        packed.load_state_dict({**state, "weight": torch.zeros(2, 2)})
    assert torch.equal(packed.values, before)


def test_assigning_load(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    state = OrderedDict((k, v.float()) for k, v in dense.state_dict().items())
    packed.load_state_dict(state, assign=True)
    assert isinstance(packed.values, nn.Parameter)
    assert packed.values.dtype == torch.float32
    assert torch.equal(packed.weight, state["weight"])


def test_state_dict_of_variables(cls: type[PackedWeight]) -> None:
    _, _, packed = made(cls)
    kept = packed.state_dict(keep_vars=True)
    kept["weight"].sum().backward()
    assert torch.equal(packed.values.grad, torch.ones_like(packed.values))
    assert not packed.state_dict()["weight"].requires_grad


def test_state_dict_hooks_and_other_members(cls: type[PackedWeight]) -> None:
    dense, mask, _ = made(cls)
    dense.register_buffer("steps", torch.tensor(3))
    dense.register_parameter("gain", nn.Parameter(torch.ones(2)))
    seen: list[str] = []
    dense.register_load_state_dict_pre_hook(lambda module, *_: seen.append(type(module).__name__))
    packed = cls.from_dense(dense, mask)
    assert set(packed.state_dict()) == {"weight", "bias", "steps", "gain"}
    packed.load_state_dict(dense.state_dict())
    assert seen == [cls.__name__]


# ---- life as a plain module -------------------------------------------------------------------------------------


def test_copies_share_the_plan_and_nothing_else(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    x = input_for(dense)
    deep = copy.deepcopy(packed)
    assert deep.plan is packed.plan
    pickled = pickle.loads(pickle.dumps(packed))
    assert pickled.plan == packed.plan
    for twin in (deep, pickled):
        assert torch.equal(twin(x), packed(x))
        with torch.no_grad():
            twin.values.add_(1)
        assert not torch.equal(twin(x), packed(x))


def test_optimisers_see_one_packed_parameter(cls: type[PackedWeight]) -> None:
    dense, mask, packed = made(cls)
    x = input_for(dense)
    target = torch.randn_like(dense(x))

    def make(module: nn.Module, weight: nn.Parameter) -> torch.optim.Optimizer:
        groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [module.bias], "lr": 0.2}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)

    steps = [(dense, make(dense, dense.weight)), (packed, make(packed, packed.values))]
    for _ in range(5):
        for module, optimiser in steps:
            optimiser.zero_grad()
            nn.functional.mse_loss(module(x), target).backward()
            if module is dense:
                dense.weight.grad.mul_(mask)
            optimiser.step()
    torch.testing.assert_close(packed.weight, dense.weight)
    torch.testing.assert_close(packed.bias, dense.bias)
    assert steps[1][1].state[packed.values]["momentum_buffer"].shape == packed.values.shape


def test_precision_and_freezing(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    x = input_for(dense)
    single = copy.deepcopy(packed).float()
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), packed(x), rtol=1e-5, atol=1e-5)
    packed.requires_grad_(False)
    assert not packed(x).requires_grad
    x.requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert packed.values.grad is None


def test_hooks(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    seen: list[str] = []
    handles = [
        packed.register_forward_pre_hook(lambda *_: seen.append("before")),
        packed.register_forward_hook(lambda *_: seen.append("after")),
        packed.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    packed(input_for(dense).requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    packed(input_for(dense))
    assert len(seen) == 3


def test_reset_parameters(cls: type[PackedWeight]) -> None:
    _, mask, packed = made(cls)
    torch.manual_seed(5)
    packed.reset_parameters()
    twin = cls.dense_type(*(4, 6, 3) if cls.dense_type is nn.Conv2d else (7, 5)).double()
    torch.manual_seed(5)
    twin.reset_parameters()
    assert torch.equal(packed.weight, twin.weight * mask)
    assert torch.equal(packed.bias, twin.bias)


def test_autocast(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    packed.float()
    x = input_for(dense).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x.bfloat16())
    torch.testing.assert_close(y.float(), packed(x), rtol=0.05, atol=0.05)


def test_wrong_inputs(cls: type[PackedWeight]) -> None:
    dense, mask, _ = made(cls)
    with pytest.raises(TypeError, match=rf"from_dense: module: expected {cls.dense_type.__name__}, got ReLU"):
        cls.from_dense(nn.ReLU())

    class Inherited(cls.dense_type):  # type: ignore[name-defined, misc]
        pass

    class Halved(cls.dense_type):  # type: ignore[name-defined, misc]
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) / 2

    for subclass, own in ((Inherited, False), (Halved, True)):
        module = copy.deepcopy(dense)
        module.__class__ = subclass
        if own:
            with pytest.raises(TypeError, match=r"from_dense: module: Halved computes by a forward of its own"):
                cls.from_dense(module)
        else:
            cls.from_dense(module)
            module.forward = dense.forward
            with pytest.raises(TypeError, match=r"Inherited computes by a forward of its own"):
                cls.from_dense(module)
    with pytest.raises(TypeError, match="mask: expected a bool tensor, got list"):
        cls.from_dense(dense, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask: expected the shape of the weight"):
        cls.from_dense(dense, mask[1:])
    with pytest.raises(ValueError, match="keeps no weight"):
        cls.from_dense(dense, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="exactly 0 and 1, got nan"):
        cls.from_dense(dense, torch.where(mask, float("nan"), 1.0))
    with pytest.raises(ValueError, match="the plan is for shape"):
        cls.from_dense(dense, fk.Plan.from_mask(torch.ones(2, 2, dtype=torch.bool)))


@pytest.mark.parametrize("cls", [SparseConv2d, SparseLinear], ids=lambda cls: cls.__name__)
def test_other_devices_and_precisions_are_named(cls: type[PackedWeight]) -> None:
    dense, _, packed = made(cls)
    with pytest.raises((TypeError, ValueError), match="dtype"):
        packed(input_for(dense).float())
    with pytest.raises(TypeError, match="float16"):
        copy.deepcopy(packed).half()(input_for(dense).half())
    with pytest.raises(ValueError, match="meta"):
        packed.to("meta")(input_for(dense).to("meta"))


@pytest.mark.parametrize("cls", [SparseConv2d, MaskedConv2d])
def test_conv2d_constructor(cls: type[Any]) -> None:
    mask = torch.rand(6, 2, 3, 1) < 0.5
    layer = cls(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, groups=2, bias=False, mask=mask)
    assert layer.stride == (2, 2)
    assert layer.bias is None
    assert torch.equal(layer.mask, mask)
    x = torch.randn(3, 4, 9, 9)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [SparseLinear, MaskedLinear])
def test_linear_constructor(cls: type[Any]) -> None:
    mask = torch.rand(6, 4) < 0.5
    layer = cls(4, 6, dtype=torch.float64, mask=fk.Plan.from_mask(mask))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert layer(x[0, 0]).shape == (6,)
