# SPDX-License-Identifier: Apache-2.0
"""Which batch norms are fused with what comes after them: only those where nothing else can see the
difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.nn import DeferrableBatchNorm2d
from fedpai_kernels.nn.fuse import find_fusions


class Parts(nn.Module):
    """conv, norm and ReLU in the order that `run` gives them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def depends_on_data(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.relu(y) if x.sum() > 0 else y


def only_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return m.relu(y) if m.training else y


def keeps_the_norm(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return m.relu(y) + y


def adds(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


def adds_to_the_other(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y += m.norm(m.conv(x))
    return torch.relu(y)


def two_norms_the_first_changes(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    y += m.other(x)
    return torch.relu(y)


def changes_the_input(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = m.norm(y)
    y.data.add_(1)
    return torch.relu(z + y)


def changes_the_summand(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = m.norm(m.conv(x)) + y
    y.data.add_(1)
    return torch.relu(z)


def sum_read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)) + x
    return torch.relu(y) + y


# What is computed, and how the norm is fused: "pair" with the ReLU, or in the words of a site, or why not.
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "adjacent": (lambda m, x: m.relu(m.norm(m.conv(x))), "the ReLU"),
    "norm_read_twice": (keeps_the_norm, "read 2 times"),
    "relu_used_twice": (lambda m, x: m.relu(m.conv(m.relu(m.norm(m.conv(x))))), "the ReLU"),
    "norm_used_twice": (lambda m, x: m.norm(m.conv(m.relu(m.norm(m.conv(x))))), "called 2 times"),
    "functional_relu": (lambda m, x: torch.relu(m.norm(m.conv(x))), "the ReLU"),
    "functional_relu_in_place": (lambda m, x: F.relu_(m.norm(m.conv(x))), "the ReLU"),
    "method_relu": (lambda m, x: m.norm(m.conv(x)).relu(), "the ReLU"),
    "another_function": (lambda m, x: torch.tanh(m.norm(m.conv(x))), "followed by tanh"),
    "norm_is_the_output": (lambda m, x: m.norm(m.relu(m.conv(x))), "followed by output"),
    "only_in_training": (only_in_training, "training and evaluation differ"),
    "two_norms_share_the_relu": (lambda m, x: m.relu(m.norm(x)) + m.relu(m.other(x)), "the ReLU"),
    "sum": (lambda m, x: m.relu(m.norm(m.conv(x)) + x), "the sum and the ReLU"),
    "sum_the_other_way": (lambda m, x: m.relu(x + m.norm(m.conv(x))), "the sum and the ReLU"),
    "torch_add": (lambda m, x: torch.relu(torch.add(x, m.norm(m.conv(x)))), "the sum and the ReLU"),
    "method_add": (lambda m, x: m.norm(m.conv(x)).add(x).relu_(), "the sum and the ReLU"),
    "method_add_in_place": (lambda m, x: m.norm(m.conv(x)).add_(x).relu(), "the sum and the ReLU"),
    "sum_in_place": (adds, "the sum and the ReLU"),
    "sum_in_place_of_the_other": (adds_to_the_other, "followed by iadd"),
    "two_norms_the_first_changes": (two_norms_the_first_changes, "the sum and the ReLU"),
    "sum_without_relu": (lambda m, x: torch.sigmoid(m.norm(m.conv(x)) + x), "the sum"),
    "sum_read_twice": (sum_read_twice, "the sum"),
    "summand_changes": (changes_the_summand, "the sum"),
    "input_changes": (changes_the_input, "its input may change before its result is read"),
    "scaled_sum": (lambda m, x: torch.relu(torch.add(m.norm(m.conv(x)), x, alpha=2)), "followed by add"),
    "sum_with_a_number": (lambda m, x: torch.relu(m.norm(m.conv(x)) + 1), "followed by add"),
    "sum_with_itself": (lambda m, x: (lambda y: y + y)(m.norm(m.conv(x))), "followed by add"),
    "summand_of_another_shape": (
        lambda m, x: torch.relu(m.norm(m.conv(x)) + x[:, :, :1, :1]),
        "the sum and the ReLU",
    ),
    "two_norms": (lambda m, x: m.relu(m.norm(m.conv(x)) + m.other(x)), "its sum goes with other"),
    "two_norms_in_place": (
        lambda m, x: m.relu(m.norm(m.conv(x)).add_(m.other(x))),
        "the sum and the ReLU",
    ),
}


def found(model: Parts) -> str:
    fusions = find_fusions(model)
    assert fusions.untraced == ""
    for owner, site in fusions.sites:
        if owner.get_submodule(site.norm) is model.norm:
            return site.what
    return fusions.others["norm"]


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_found(run: Callable[[Any, Tensor], Tensor], expected: str) -> None:
    assert found(Parts(run)) == expected


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES.keys())
def test_the_converted_model_computes_the_same(run: Callable[[Any, Tensor], Tensor], expected: str) -> None:
    model = Parts(run).double()
    nn.init.normal_(model.norm.weight)
    mask = torch.rand(model.conv.weight.shape) < 0.3
    converted = fk.sparsify(model, {"conv": mask})
    with torch.no_grad():
        model.conv.weight.mul_(mask)
    assert (type(converted.norm) is DeferrableBatchNorm2d) == expected.startswith("the ")
    for training in (True, False):
        model.train(training)
        converted.train(training)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        given = x.clone().requires_grad_(), fk.to_batch_last(x.clone()).requires_grad_()
        expected_z, z = model(given[0]), converted(given[1])
        dz = torch.randn_like(z)
        expected_z.backward(dz)
        z.backward(dz)
        assert type(z) is Tensor
        torch.testing.assert_close(z, expected_z)
        torch.testing.assert_close(given[1].grad, given[0].grad)
    for name in ("norm", "other"):
        ours, theirs = getattr(converted, name), getattr(model, name)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_a_model_that_cannot_be_traced_says_so() -> None:
    model = Parts(depends_on_data)
    fusions = find_fusions(model)
    assert not fusions.sites
    assert "torch.fx cannot trace the model" in fusions.untraced
    report = fk.sparsify_(model, {"conv": torch.rand(3, 3, 3, 3) < 0.3})
    assert any("not fused" in note for note in report.notes)
    assert type(model.norm) is fk.nn.BatchLastBatchNorm2d


def test_tracing_leaves_no_trace() -> None:
    calls: list[str] = []

    def run(m: Any, x: Tensor) -> Tensor:
        m.last = x
        m.norm.running_mean.add_(1)
        torch.rand(1)
        return m.relu(m.norm(m.conv(x)))

    model = Parts(run)
    model.conv.register_forward_hook(lambda *_: calls.append("hook"))
    mean, state = model.norm.running_mean.clone(), torch.get_rng_state()
    assert len(find_fusions(model).sites) == 1
    assert not hasattr(model, "last")
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert model.training


def test_modules_of_one_sequential() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    fusions = find_fusions(model)
    ((owner, site),) = fusions.sites
    assert owner is model
    assert (site.norm, site.activation_module, site.what) == ("1", "2", "the ReLU")
    assert fusions.others == {"3": "followed by output"}


class Residual(nn.Module):
    """Adds what it is given to what its body makes of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


def test_a_norm_inside_of_what_is_added() -> None:
    body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
    model = nn.Sequential(Residual(body), nn.ReLU())
    ((owner, site),) = find_fusions(model).sites
    assert owner is model[0]
    # The ReLU is applied by another module, out of the owner's sight.
    assert (site.norm, site.between, site.relu) == ("body.1.0", ("body", "body.1"), False)


def test_a_norm_that_was_called_elsewhere() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Residual(nn.Identity()))
    assert find_fusions(model).others == {"1": "read 2 times"}


def test_the_report_names_what_stays_by_itself() -> None:
    model = Parts(lambda m, x: m.other(m.relu(m.norm(m.conv(x)) + x)))
    report = fk.sparsify_(model, {"conv": torch.rand(3, 3, 3, 3) < 0.3})
    assert "fused: 1 batch norms with the sum and the ReLU after them" in report.notes
    assert "not fused: other (followed by output)" in report.notes


@pytest.mark.parametrize("left_out", ["norm", "relu"])
def test_filter_fn_keeps_steps_apart(left_out: str) -> None:
    model = Parts(lambda m, x: m.relu(m.norm(m.conv(x)) + x))
    mask = torch.rand(3, 3, 3, 3) < 0.3
    report = fk.sparsify_(model, {"conv": mask}, filter_fn=lambda module, name: name != left_out)
    assert any("norm (left out by filter_fn)" in note for note in report.notes)
    assert type(model.norm) is not DeferrableBatchNorm2d
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
