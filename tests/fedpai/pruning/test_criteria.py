# SPDX-License-Identifier: Apache-2.0
"""Each criterion against a slow restatement of its published formula, in float64 on a tiny network."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.functional import hvp
from torch.func import functional_call

from fedpai import models
from fedpai.pruning import prune, scores
from fedpai.pruning.synflow import SMALLEST_FLOW

Tensors = dict[str, torch.Tensor]


class Tiny(nn.Module):
    """Two convolutions, one with a shortcut beside it, and a linear layer; biases and batch norm included."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(self.flatten(self.pool(torch.relu(self.conv2(x)) + x)))


LAYERS = ("conv1", "conv2", "fc")


@pytest.fixture
def tiny() -> nn.Module:
    return Tiny().double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (9,))


def unit(values: Tensors) -> Tensors:
    total = sum(v.abs().sum() for v in values.values())
    return {name: v / total for name, v in values.items()}


def state(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loss_of_weights(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, temperature: float
) -> Callable[..., torch.Tensor]:
    """The loss as a plain function of the three weights, on a throw-away state."""
    model.train()

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        changed = state(model) | {f"{n}.weight": w for n, w in zip(LAYERS, weights, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, changed, (x,)) / temperature, y)

    return loss


def weights_of(model: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(model.get_submodule(name).weight.detach().clone() for name in LAYERS)


def test_snip_is_the_sensitivity_to_a_multiplier(tiny: nn.Module, batch: tuple) -> None:
    x, y = batch
    weights = weights_of(tiny)
    loss = loss_of_weights(tiny, x, y, 1.0)
    ones = [torch.ones_like(w, requires_grad=True) for w in weights]
    value = loss(*(c * w for c, w in zip(ones, weights, strict=True)))
    expected = unit({n: g.abs() for n, g in zip(LAYERS, torch.autograd.grad(value, ones), strict=True)})
    torch.testing.assert_close(scores(tiny, "snip", data=batch), expected)


def test_snip_over_several_batches_takes_the_absolute_value_once(batch: tuple) -> None:
    model = Tiny(norm=False).double()
    x, y = batch
    pieces = [(x[:2], y[:2]), (x[2:], y[2:])]
    torch.testing.assert_close(scores(model, "snip", data=pieces), scores(model, "snip", data=batch))


def grasp_slowly(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    """w * Hg with H from torch's own Hessian-vector product, one half at a time."""
    weights = weights_of(model)
    halves = [loss_of_weights(model, x[:4], y[:4], 200.0), loss_of_weights(model, x[4:], y[4:], 200.0)]
    leaves = [w.clone().requires_grad_() for w in weights]
    gradients = [torch.autograd.grad(loss(*leaves), leaves) for loss in halves]
    g = tuple(sum(parts) for parts in zip(*gradients, strict=True))
    products = [hvp(loss, weights, g)[1] for loss in halves]
    return {n: w * (a + b) for n, w, a, b in zip(LAYERS, weights, *products, strict=True)}


def test_grasp_is_w_times_hessian_times_gradient(tiny: nn.Module, batch: tuple) -> None:
    expected = unit(grasp_slowly(tiny, *batch))
    torch.testing.assert_close(scores(tiny, "grasp", data=batch), expected)


def test_grasp_hessian_product_against_finite_differences(tiny: nn.Module, batch: tuple) -> None:
    x, y = batch
    weights = weights_of(tiny)
    halves = [loss_of_weights(tiny, x[:4], y[:4], 200.0), loss_of_weights(tiny, x[4:], y[4:], 200.0)]

    def gradient(at: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        leaves = [w.clone().requires_grad_() for w in at]
        return list(torch.autograd.grad(halves[0](*leaves) + halves[1](*leaves), leaves))

    g = gradient(weights)
    step = 1e-4 / max(part.abs().max() for part in g)
    ahead = gradient(tuple(w + step * part for w, part in zip(weights, g, strict=True)))
    behind = gradient(tuple(w - step * part for w, part in zip(weights, g, strict=True)))
    expected = unit({n: w * (a - b) for n, w, a, b in zip(LAYERS, weights, ahead, behind, strict=True)})
    found = scores(tiny, "grasp", data=batch)
    assert max((found[n] - expected[n]).abs().max() for n in LAYERS) < 1e-6


def test_grasp_drops_the_highest_published_score(tiny: nn.Module, batch: tuple) -> None:
    published = torch.cat([-value.flatten() for value in grasp_slowly(tiny, *batch).values()])
    masks = prune(tiny, 0.5, "grasp", data=batch, keep_layers_alive=False)
    kept = torch.cat([masks[name].flatten() for name in LAYERS])
    assert published[kept].max() < published[~kept].min()


def test_grasp_of_a_batch_too_small_to_cut(batch: tuple) -> None:
    model = Tiny(norm=False).double()
    x, y = batch
    whole = loss_of_weights(model, x[:3], y[:3], 200.0)
    weights = weights_of(model)
    leaves = [w.clone().requires_grad_() for w in weights]
    product = hvp(whole, weights, torch.autograd.grad(whole(*leaves), leaves))[1]
    expected = unit({n: w * p for n, w, p in zip(LAYERS, weights, product, strict=True)})
    torch.testing.assert_close(scores(model, "grasp", data=(x[:3], y[:3])), expected)


def flow(model: nn.Module, weights: Tensors) -> float:
    """R of the definition: absolute parameters, running mean 0, eval mode, all-ones image."""
    parameters = {n: p.abs() for n, p in state(model).items() if n != "bn.num_batches_tracked"}
    parameters["bn.running_mean"] = torch.zeros_like(parameters["bn.running_mean"])
    parameters |= {f"{n}.weight": w.abs() for n, w in weights.items()}
    model.eval()
    with torch.no_grad():
        return functional_call(model, parameters, (torch.ones(1, 2, 4, 4, dtype=torch.float64),)).sum().item()


def synflow_slowly(model: nn.Module, weights: Tensors) -> Tensors:
    """R is linear in each single weight, so ``w dR/dw`` is what R loses when that weight becomes 0."""
    total = flow(model, weights)
    result = {}
    for name, weight in weights.items():
        score = torch.zeros_like(weight)
        for i in range(weight.numel()):
            without = weight.clone()
            without.view(-1)[i] = 0
            score.view(-1)[i] = total - flow(model, weights | {name: without})
        result[name] = score
    return result


@pytest.fixture
def trained(tiny: nn.Module) -> nn.Module:
    """Statistics and norm weights of a network that is no longer at initialisation."""
    with torch.no_grad():
        tiny.bn.running_mean.normal_()
        tiny.bn.running_var.uniform_(0.5, 2)
        tiny.bn.weight.normal_()
        tiny.bn.bias.normal_()
    return tiny


def test_synflow_scores_are_what_the_flow_loses(trained: nn.Module) -> None:
    expected = unit(synflow_slowly(trained, dict(zip(LAYERS, weights_of(trained), strict=True))))
    found = scores(trained, "synflow", input_shape=(2, 4, 4))
    for name in LAYERS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-9)


def test_synflow_iterations(trained: nn.Module) -> None:
    weights = dict(zip(LAYERS, weights_of(trained), strict=True))
    total = sum(w.numel() for w in weights.values())
    alive = torch.ones(total, dtype=torch.bool)
    for step in range(1, 6):
        score = torch.cat([s.flatten() for s in synflow_slowly(trained, weights).values()])
        score[~alive] = -1
        kept = score.argsort(descending=True, stable=True)[: round(0.2 ** (step / 5) * total)]
        alive = torch.zeros(total, dtype=torch.bool)
        alive[kept] = True
        parts = alive.split([w.numel() for w in weights.values()])
        weights = {n: w * part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}
    masks = prune(trained, 0.8, "synflow", iterations=5, input_shape=(2, 4, 4))
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), alive)


@pytest.mark.parametrize("factor", [1e12, 1e-12])
def test_synflow_outside_the_range_of_float32(factor: float) -> None:
    """A factor on whole layers of a plain chain multiplies every score alike, so it must change nothing."""
    model = models.create("vgg11", width=0.05, seed=0)
    plain = prune(model, 0.9, "synflow", iterations=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(factor)
    scaled = prune(model, 0.9, "synflow", iterations=4)
    different = sum(int((plain[n] != scaled[n]).sum()) for n in plain)
    # float32 and float64 may order a near tie differently.
    assert different <= 4
    assert factor**8 > 1e38 or factor**8 < SMALLEST_FLOW


def test_synflow_of_a_norm_without_running_statistics(tiny: nn.Module) -> None:
    masks = prune(tiny, 0.7, "synflow", iterations=3, input_shape=(2, 4, 4))
    tiny.bn = nn.BatchNorm2d(3, track_running_stats=False).double()
    again = prune(tiny, 0.7, "synflow", iterations=3, input_shape=(2, 4, 4))
    assert all(torch.equal(masks[n], again[n]) for n in LAYERS)


def test_magnitude_and_random(tiny: nn.Module) -> None:
    for name, score in scores(tiny, "magnitude").items():
        assert torch.equal(score, tiny.get_submodule(name).weight.abs())
    one, two, other = (scores(tiny, "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(one["fc"], two["fc"])
    assert not torch.equal(one["fc"], other["fc"])
