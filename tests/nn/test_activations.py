# SPDX-License-Identifier: Apache-2.0
"""Activations other than ReLU, found behind batch norms in every spelling and computed with them: whole models against
unfused ones and against dense-masked torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.nn import DeferrableBatchNorm2d
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.chains import check_equal, check_same, converted, images, mask_of, outcome

EXACT, CLOSE = "exact", "close"
# The spelling, the title in the report, and whether the bits are those of the separate steps.
SPELLINGS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "ReLU6": (nn.ReLU6, "ReLU6", EXACT),
    "ReLU6 in place": (lambda: nn.ReLU6(True), "ReLU6", EXACT),
    "relu6": (lambda: F.relu6, "ReLU6", EXACT),
    "relu6 in place": (lambda: lambda y: F.relu6(y, True), "ReLU6", EXACT),
    "Hardtanh": (lambda: nn.Hardtanh(0, 6), "ReLU6", EXACT),
    "hardtanh": (lambda: lambda y: F.hardtanh(y, 0.0, 6.0), "ReLU6", EXACT),
    "hardtanh_": (lambda: lambda y: F.hardtanh_(y, 0.0, 6.0), "ReLU6", EXACT),
    "LeakyReLU": (nn.LeakyReLU, "LeakyReLU", EXACT),
    "LeakyReLU in place": (lambda: nn.LeakyReLU(0.2, inplace=True), "LeakyReLU", EXACT),
    "leaky_relu": (lambda: F.leaky_relu, "LeakyReLU", EXACT),
    "leaky_relu by name": (lambda: lambda y: F.leaky_relu(y, negative_slope=0.3), "LeakyReLU", EXACT),
    "leaky_relu_": (lambda: lambda y: F.leaky_relu_(y, 0.3), "LeakyReLU", EXACT),
    "SiLU": (nn.SiLU, "SiLU", CLOSE),
    "SiLU in place": (lambda: nn.SiLU(True), "SiLU", CLOSE),
    "silu": (lambda: F.silu, "SiLU", CLOSE),
    "GELU": (nn.GELU, "GELU", CLOSE),
    "GELU tanh": (lambda: nn.GELU("tanh"), "GELU", CLOSE),
    "gelu": (lambda: F.gelu, "GELU", CLOSE),
    "gelu tanh": (lambda: lambda y: F.gelu(y, approximate="tanh"), "GELU", CLOSE),
}
SPELLED = pytest.mark.parametrize("spelling", SPELLINGS)


class Chain(nn.Module):
    """conv, norm, activation, conv; or with a sum before the activation and nothing behind it."""

    def __init__(self, activation: Any, adds: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.activation, self.adds = activation, adds

    def forward(self, x: Tensor) -> Tensor:
        if self.adds:
            return self.activation(self.norm(self.first(self.last(x))) + x)
        return self.last(self.activation(self.norm(self.first(x))))


def three(make: Callable[[], nn.Module]) -> list[Any]:
    """The same model in double: fused, not fused, and dense with its masks applied."""
    models = []
    for fuse in (True, False, None):
        torch.manual_seed(1)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        if fuse is None:
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.Conv2d):
                        module.weight.mul_(mask_of(module.weight.shape))
        else:
            converted(model, fuse)
        models.append(model)
    return models


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name.replace("values", "weight") for name in ours} == theirs.keys()
    for name, value in ours.items():
        if "values" not in name:  # packed; compared below as what is left of the dense ones
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def check_packed(fused: nn.Module, dense: nn.Module, x: Tensor) -> None:
    """The gradients of the packed weights against the dense ones where the masks keep them."""
    for model in (fused, dense):
        model.train()
        model(x).square().sum().backward()
    for name, module in fused.named_modules():
        if isinstance(module, fk.nn.PackedWeight):
            weight = dense.get_submodule(name).weight
            expected = module.plan.pack(weight.grad)
            torch.testing.assert_close(module.values.grad, expected, rtol=1e-9, atol=1e-9)
        for key, parameter in module.named_parameters(recurse=False):
            if key != "values":
                dense_grad = getattr(dense.get_submodule(name), key).grad
                torch.testing.assert_close(parameter.grad, dense_grad, rtol=1e-9, atol=1e-9)


def check(make: Callable[[], nn.Module], exact: bool, x: Tensor | None = None) -> nn.Module:
    fused, plain, dense = three(make)
    x = images() if x is None else x
    if exact:
        check_same(fused, plain, x)
    for training in (True, True, False):
        results = [outcome(model.train(training), x) for model in (fused, plain)]
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-9)
    fused, _, dense = three(make)
    for training in (True, False):
        z, expected = (model.train(training)(x) for model in (fused, dense))
        torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    for (name, buffer), (_, other) in zip(fused.named_buffers(), dense.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
    check_packed(fused, dense, x)
    return fused


@SPELLED
@pytest.mark.parametrize("adds", [False, True], ids=["convolution", "sum"])
def test_every_spelling(
    spelling: str, adds: bool, together: list[bool], computed: list[PendingNorm]
) -> None:
    make, title, bits = SPELLINGS[spelling]
    report = converted(Chain(make(), adds))
    what = f"the sum and the {title}" if adds else f"the {title} and the convolution"
    assert f"fused: 1 batch norms with {what} after them" in report.notes
    check(lambda: Chain(make(), adds), bits == EXACT)
    assert not computed
    assert bool(together) is not adds


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.LeakyReLU(-0.1), "followed by LeakyReLU"),
        (lambda y: F.leaky_relu(y, -0.1), "followed by leaky_relu"),
        (nn.Hardtanh(), "followed by Hardtanh"),
        (lambda y: F.hardtanh(y, max_val=6.0), "followed by hardtanh"),
        (nn.Hardtanh(0, 5), "followed by Hardtanh"),
        (nn.Sigmoid(), "followed by Sigmoid"),
        (nn.ELU(), "followed by ELU"),
    ],
)
def test_what_is_another_function_stays(activation: Any, reason: str) -> None:
    model = Chain(activation, False)
    assert any(reason in note for note in converted(model).notes)
    plain = Chain(activation, False)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.double()(images()), plain.double()(images()))


def test_an_activation_that_changes_after_the_conversion() -> None:
    fused, plain, _ = three(lambda: Chain(nn.LeakyReLU(0.1), False))
    for model in (fused, plain):
        model.activation.negative_slope = 0.7
    check_same(fused, plain)
    for model in (fused, plain):
        model.activation = nn.ReLU6()
    check_same(fused, plain)


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU])
def test_hooks_see_the_separate_steps(kind: type[nn.Module]) -> None:
    fused, plain, _ = three(lambda: Chain(kind(), False))
    seen: list[list[Tensor]] = [[], []]
    for model, found in zip((fused, plain), seen, strict=True):
        model.activation.register_forward_hook(lambda m, args, y, found=found: found.extend((args[0], y)))
        model(images())
    for a, b in zip(*seen, strict=True):
        assert type(a) is Tensor
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.SiLU])
def test_back_to_dense_and_copies(kind: type[nn.Module]) -> None:
    fused, _, dense = three(lambda: Chain(kind(), False))
    check_equal(outcome(copy.deepcopy(fused), images()), outcome(copy.deepcopy(fused), images()))
    again = fk.densify_(copy.deepcopy(fused))
    assert type(again.norm) is nn.BatchNorm2d
    assert not again._forward_hooks
    torch.testing.assert_close(again(images()), dense(images()))


# ---- whole models
# ----------------------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, as in MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobile_net() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        InvertedResidual(8, 8, 1, 2),
        InvertedResidual(8, 12, 2, 3),
        InvertedResidual(12, 12, 1, 3),
        nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)),
    )


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2),
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU(),
    )  # fmt: skip


def test_mobile_net(computed: list[PendingNorm]) -> None:
    fused = check(mobile_net, True)
    assert not computed
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    alone = [m for m in norms if type(m) is not DeferrableBatchNorm2d]
    assert len(alone) == 1
    assert converted(mobile_net()).notes[1:] == [
        "fused: 5 batch norms with the ReLU6 after them",  # a convolution in another module reads it
        "fused: 3 batch norms with the ReLU6 and the convolution after them",
        "fused: 2 batch norms with the sum after them",
        "not fused: 2.body.3 (read 2 times)",
    ]


def test_a_sequential_of_ones_own(together: list[bool], computed: list[PendingNorm]) -> None:
    check(sequential, False)
    assert together
    assert not computed
    assert converted(sequential()).notes[1:] == [
        "fused: 1 batch norms with the LeakyReLU and the convolution after them",
        "fused: 1 batch norms with the SiLU and the convolution after them",
        "fused: 1 batch norms with the GELU after them",
    ]
