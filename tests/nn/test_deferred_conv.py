# SPDX-License-Identifier: Apache-2.0
"""A batch norm that is computed while the convolution after it loads its input gives the numbers of one that is not,
whatever is done with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.blocks import CHANGED, Double
from tests.nn.chains import (
    EVERY_RELU,
    SETTINGS,
    Chain,
    Leaving,
    both,
    chains,
    check_close,
    check_equal,
    check_same,
    images,
    outcome,
)

# ---- the same bits
# ----------------------------------------------------------------------------------------------------------------


@EVERY_RELU
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_fused_is_unfused_bit_by_bit(
    settings: dict[str, Any], relu: str, together: list[bool], computed: list[PendingNorm]
) -> None:
    check_same(*chains(relu, **settings))
    assert len(together) == 3
    assert not computed


def test_in_single_precision(together: list[bool]) -> None:
    check_same(*both(Chain, torch.float32), images(torch.float32))
    assert together


FROZEN = ["norm", "last", "first norm", "last.values", "last.bias norm.weight", "norm last first"]


@pytest.mark.parametrize("frozen", FROZEN)
def test_parameters_without_a_gradient(frozen: str, together: list[bool]) -> None:
    fused, plain = chains()
    for model in (fused, plain):
        for name, p in model.named_parameters():
            p.requires_grad_(not any(name.startswith(part) for part in frozen.split()))
    check_same(fused, plain)
    assert len(together) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_without_gradients(context: Callable[[], Any], together: list[bool], computed: list[PendingNorm]) -> None:
    fused, plain = chains("module_in_place")
    for training in (True, False):
        with context():
            z = fused.train(training)(images())
            assert torch.equal(z, plain.train(training)(images()))
        assert not z.requires_grad
    check_equal(fused.state_dict(), plain.state_dict())
    assert len(together) == 2
    assert not computed


def test_gradients_of_gradients() -> None:
    fused, plain = chains()
    for training in (True, False):
        found = []
        for model in (fused.train(training), plain.train(training)):
            leaf = images().requires_grad_()
            (dx,) = torch.autograd.grad(model(leaf).pow(2).sum(), leaf, create_graph=True)
            model.zero_grad()
            (dx.pow(2).sum() + model(leaf).sum()).backward()
            found.append([dx, leaf.grad, *(p.grad.clone() for p in model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_bias_of_the_convolution_may_change_before_the_backward_pass(create_graph: bool) -> None:
    found = []
    for model in chains():
        z = model(images())
        with torch.no_grad():
            model.last.bias.add_(1)
        found.append(torch.autograd.grad(z.pow(2).sum(), list(model.parameters()), create_graph=create_graph))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast(together: list[bool]) -> None:
    fused, plain = both(Chain, torch.float32)
    for given in (images(torch.float32), images(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            check_same(fused, plain, given)
    assert together


# ---- a forward that does something else
# ----------------------------------------------------------------------------------------------------------------


def past_autograd(look: Callable[[Chain, Tensor], Any]) -> Callable[[Chain, Tensor], Any]:
    return lambda m, y: look(m, y.data)


LOOKS: dict[str, Callable[[Chain, Tensor], Any]] = {
    "print": lambda m, y: f"{y}".split("grad_fn")[0],
    "numpy": lambda m, y: y.detach().numpy().tolist(),
    "arithmetic": lambda m, y: (y * 2 - 1).sum().item(),
    "a_sum_of_its_own": lambda m, y: (y + y).sum().item(),
    "in_place": lambda m, y: y.mul_(2).sum().item(),
    "in_place_sum": lambda m, y: y.add_(m.seen[0].detach()).sum().item(),
    "indices": lambda m, y: y[:, 1:3].sum().item(),
    "assigned": lambda m, y: y.__setitem__((slice(None), 0), 1.5),
    "without_gradient": lambda m, y: (y.detach() + 1).sum().item(),
    "another_relu": lambda m, y: torch.relu(y).sum().item(),
    "a_copy": lambda m, y: copy.deepcopy(y.detach()).sum().item(),
    "its_layout": lambda m, y: (y.stride(), y.is_contiguous(), fk.layout.is_batch_last(y)),
    "its_shape": lambda m, y: (y.shape, y.dim(), y.dtype, len(y), isinstance(y, Tensor)),
    "a_dense_convolution": lambda m, y: nn.Conv2d(6, 1, 1).double()(y).shape,
    "a_hook": lambda m, y: y.register_hook(lambda dy: dy * 2) and None,
}


@pytest.mark.parametrize("relu", ["module", "module_in_place", "none"])
@pytest.mark.parametrize("where", ["after_norm", "after_relu"])
@pytest.mark.parametrize("what", LOOKS)
def test_whatever_else_is_done_in_between(what: str, where: str, relu: str) -> None:
    look = LOOKS[what]
    # Torch's ReLU keeps its result and takes its gradient from it.
    changes_it = what in ("in_place", "in_place_sum", "assigned") and where == "after_relu" and relu != "none"
    if changes_it:
        look = past_autograd(look)
    fused, plain = chains(relu)
    outcomes = []
    for model in (fused, plain):
        setattr(model, where, look)
        outcomes.append(outcome(model, images()))
    for name, value in outcomes[0].items():
        if not (changes_it and name.startswith("d")):
            torch.testing.assert_close(value, outcomes[1][name], msg=lambda m, name=name: f"{name}: {m}")
    ours, theirs = fused.seen[1:], plain.seen[1:]
    assert ours == pytest.approx(theirs) if all(isinstance(v, float) for v in ours) else str(ours) == str(theirs)


SECOND_READERS: dict[str, Callable[[Chain, Tensor], Any]] = {
    "a_function": lambda m, y: torch.tanh(y).mean(),
    "in_place": lambda m, y: y.mul_(2).mean() if not y.requires_grad else y.mul(2).mean(),
    "the_convolution_again": lambda m, y: m.last(y),
    "its_relu": lambda m, y: torch.relu(y - 0.5).mean(),
    "a_norm": lambda m, y: nn.BatchNorm2d(6).double()(y).abs().mean(),
    "without_gradient": lambda m, y: y.detach().mean(),
}


@pytest.mark.parametrize("relu", ["module", "module_in_place", "function", "none"])
@pytest.mark.parametrize("read", SECOND_READERS.values(), ids=SECOND_READERS.keys())
def test_a_second_reader_that_only_appears_when_it_runs(
    read: Callable[[Chain, Tensor], Any], relu: str, together: list[bool]
) -> None:
    fused, plain = chains(relu)
    fused.after_last = plain.after_last = read
    check_close(fused, plain)
    assert together


def test_it_is_stored_and_read_later(together: list[bool]) -> None:
    """By something outside of the forward, after the convolution has read it."""
    fused, plain = chains()
    found = []
    for model in (fused, plain):
        model.after_relu = lambda m, y: y
        leaf = images().requires_grad_()
        z = model(leaf)
        (z.sum() + model.seen[2].pow(2).sum()).backward()
        model.zero_grad(set_to_none=False)
        found.append([z, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(together) == 1


ASTRAY: dict[str, Callable[[Chain, Tensor], Tensor]] = {
    "a_function_of_autograd": lambda m, y: Double.apply(y).mean(),
}


@pytest.mark.parametrize("leaf", ["input", "parameter", "everything"])
@pytest.mark.parametrize("read", ASTRAY.values(), ids=ASTRAY.keys())
def test_what_torch_cannot_ask_for_is_an_error_and_no_wrong_gradient(
    read: Callable[[Chain, Tensor], Tensor], leaf: str
) -> None:
    """Whatever is differentiated with respect to."""
    fused, plain = chains()
    fused.after_last = plain.after_last = read
    x = images().requires_grad_()
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    z = fused(x).sum()
    if leaf == "everything":
        with pytest.raises(RuntimeError, match="fuse=False"):
            z.backward()
    else:
        with pytest.raises(RuntimeError, match="fuse=False"):
            torch.autograd.grad(z, x if leaf == "input" else fused.norm.bias)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_result_that_nobody_reads_still_counts(momentum: float | None) -> None:
    fused, plain = both(Leaving)
    for model in (fused, plain):
        model.norm.momentum = momentum
        model.leave = lambda h, y: h * 1
    check_same(fused, plain)
    assert fused.norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_returned_is_computed(relu: bool) -> None:
    fused, plain = both(Leaving)
    for model in (fused, plain):
        model.leave = lambda h, y: torch.relu(y) if relu else y
    check_same(fused, plain)
    for model in (fused, plain):
        model.leave = lambda h, y: {"a": [y, (h, torch.relu(y))]}
    ours, theirs = fused(images())["a"], plain(images())["a"]
    for a, b in ((ours[0], theirs[0]), (ours[1][1], theirs[1][1])):
        assert type(a) is Tensor
        assert torch.equal(a, b)


def test_an_error_in_between_leaves_the_statistics_of_the_separate_steps() -> None:
    def stop(m: Chain, y: Tensor) -> None:
        raise ValueError("stop")

    fused, plain = chains()
    for model in (fused, plain):
        model.after_norm = stop
        with pytest.raises(ValueError, match="stop"):
            model(images())
    check_equal(fused.state_dict(), plain.state_dict())
    assert type(fused.norm(images().repeat(1, 2, 1, 1)[:, :6])) is Tensor


@pytest.mark.parametrize("what", ["input", "weight", "running_mean"])
def test_what_it_reads_changed_is_an_error(what: str) -> None:
    fused, _ = chains()
    if what == "running_mean":
        fused.eval()

    @torch.no_grad()
    def change(m: Chain, y: Tensor) -> None:
        changed = m.norm_input if what == "input" else getattr(m.norm, what)
        changed.add_(1)

    fused.first.register_forward_hook(lambda m, args, y: setattr(fused, "norm_input", y))
    fused.after_norm = change
    with pytest.raises(RuntimeError, match=CHANGED):
        fused(images())


@pytest.mark.parametrize("before", ["relu", "last"])
def test_a_summand_that_changes_is_an_error(before: str) -> None:
    """The sum is one that the trace does not know."""

    class Adds(Leaving):
        summand: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            if self.summand is not None:
                y = y + self.summand
                if before == "relu":
                    self.summand.mul_(3)
            y = torch.relu(y)
            if self.summand is not None and before == "last":
                self.summand.mul_(3)
            return self.last(y)

    fused, plain = both(Adds)
    for model in (fused, plain):
        model.summand = fk.to_batch_last(torch.ones(7, 4, 5, 6).double())
    plain(images())
    with pytest.raises(RuntimeError, match=CHANGED):
        fused(images())
