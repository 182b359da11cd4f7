# SPDX-License-Identifier: Apache-2.0
"""Sizes, shapes, determinism and fx-traceability of the networks."""

import pytest
import torch
from torch import fx, nn

from fedpai import models

ALL = models.names()


def weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def multiply_adds(model: nn.Module) -> int:
    """Forward multiply-adds of one image, from the shapes that the hooks of a meta-device run see."""
    total = 0

    def count(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * (output[0, 0].numel() if output.dim() == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.empty(1, *model.input_shape, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "millions", "gigamacs"),
    [
        ("resnet18", 11.16, 0.555),
        ("vgg19", 20.02, 0.398),
        ("wideresnet", 36.5, 5.24),
        ("wrn16x4", 2.75, 0.393),
    ],
)
def test_published_sizes(name: str, millions: float, gigamacs: float) -> None:
    with torch.device("meta"):
        model = models.create(name)
    assert weights(model) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert multiply_adds(model) / 1e9 == pytest.approx(gigamacs, rel=5e-3)


def test_mlp_is_784_128_128_10() -> None:
    model = models.create("mlp", in_channels=1, image_size=28)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(128, 784), (128, 128), (10, 128)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_forward_and_backward(name: str, channels: int, size: int) -> None:
    model = models.create(name, num_classes=7, in_channels=channels, width=0.05, image_size=size, seed=1)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_each_module_is_used_once_and_fx_traces(name: str) -> None:
    model = models.create(name, width=0.05, seed=0)
    called = [node.target for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    leaves = [n for n, m in model.named_modules() if not list(m.children())]
    assert sorted(called) == sorted(leaves)


def test_seed_decides_the_weights_and_spares_the_global_generator() -> None:
    before = torch.get_rng_state()
    one = models.create("resnet18", width=0.1, seed=3).state_dict()
    two = models.create("resnet18", width=0.1, seed=3).state_dict()
    other = models.create("resnet18", width=0.1, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    torch.manual_seed(3)
    unseeded = models.create("resnet18", width=0.1).state_dict()
    assert all(torch.equal(one[k], unseeded[k]) for k in one)


def test_kaiming_variance() -> None:
    model = models.create("vgg11", seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # Relative spread of a sample variance is sqrt(2 / n); five of them.
            slack = 5 * (2 / module.weight.numel()) ** 0.5
            assert module.weight.var().item() * fan_in / 2 == pytest.approx(1, abs=slack)


def test_input_shape_is_recorded() -> None:
    assert models.create("lenet5", in_channels=1, image_size=28).input_shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "resnet99"}, r"name: unknown model 'resnet99', expected one of .*resnet18"),
        ({"name": "wrn17x4"}, r"depth: got 17, expected 6 n \+ 4"),
        ({"name": "vgg11", "image_size": 8}, "image_size: got 8, expected at least 16 for vgg11"),
        ({"name": "lenet5", "image_size": 14}, "image_size: got 14"),
        ({"name": "mlp", "num_classes": 0}, "num_classes: got 0"),
        ({"name": "mlp", "in_channels": -1}, "in_channels: got -1"),
        ({"name": "mlp", "width": float("nan")}, "width: got nan"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create(**kwargs)
