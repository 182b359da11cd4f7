# SPDX-License-Identifier: Apache-2.0
"""A batch norm that waits for the sum after it gives the numbers of one that does not, whatever is done with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fedpai_kernels as fk
from fedpai_kernels.nn import DeferrableBatchNorm2d
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.blocks import CHANGED, Block, Double, check_fused, converted, images, results

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum_none": {"momentum": None},
    "not_affine": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_fused_is_unfused_bit_by_bit(settings: dict[str, Any], computed: list[PendingNorm]) -> None:
    block = converted(**settings)
    check_fused(block)
    assert not computed


def detour(block: Block, y: Tensor) -> Tensor:
    """What an autograd.Function is given, torch cannot ask for."""
    return Double.apply(y)


LOOKS: dict[str, Callable[[Block, Tensor], Any]] = {
    "arithmetic": lambda m, y: (y * 2).sum().item(),
    "in_place": lambda m, y: y.mul_(2).sum().item(),
    "numpy": lambda m, y: y.detach().numpy().copy(),
    "in_a_list": lambda m, y: torch.cat([y, y], 1).shape,
    "print": lambda m, y: repr(y),
    "without_gradient": lambda m, y: (y.detach() + 1).sum().item(),
    "a_sum_of_its_own": lambda m, y: torch.relu(y + y).sum().item(),
    "another_relu": lambda m, y: torch.relu(y).sum().item(),
    "requires_grad": lambda m, y: (y.requires_grad, y.is_leaf, type(y.grad_fn).__name__ != "NoneType"),
    "another_module": lambda m, y: nn.Conv2d(4, 1, 1).double()(y).shape,
    "one_of_ours": lambda m, y: fk.to_batch_last(y * 1).sum().item(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_whatever_else_is_done_with_it(look: Callable[[Block, Tensor], Any]) -> None:
    """The forward does something that it did not do when it was traced, and still gets the right numbers."""
    block, plain = converted(), converted(fuse=False)
    x = images()
    for b in (block, plain):
        b.between = look
    ours, theirs = results(block, x), results(plain, x)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")
    if isinstance(block.seen, float):
        torch.testing.assert_close(block.seen, plain.seen)
    elif isinstance(block.seen, tuple):
        assert block.seen == plain.seen


def test_shapes_are_known_without_computing(computed: list[PendingNorm]) -> None:
    block = converted()
    block.between = lambda m, y: (
        y.shape,
        y.size(1),
        y.dim(),
        y.ndim,
        y.dtype,
        y.device,
        y.numel(),
        isinstance(y, Tensor),
    )
    x = images()
    block(x)
    assert block.seen == (x.shape, 4, 4, 4, x.dtype, x.device, x.numel(), True)
    assert not computed


def test_what_torch_cannot_ask_for_is_an_error_and_no_wrong_gradient() -> None:
    block = converted()
    block.between = detour
    z = block(images())
    with pytest.raises(RuntimeError, match="fuse=False"):
        (z.sum() + block.seen.sum()).backward()


def test_an_input_that_changed_is_an_error() -> None:
    block = converted(affine=True)
    block.eval()

    def change(m: Block, y: Tensor) -> None:
        with torch.no_grad():
            m.norm.running_mean.add_(1)

    block.between = change
    with pytest.raises(RuntimeError, match=CHANGED):
        block(images())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["block", "norm"])
def test_checkpointing(part: str, reentrant: bool) -> None:
    """Of the whole block, and of a part that runs again without the block."""
    block, plain, x = converted(), converted(fuse=False), images()
    if part == "norm":
        for b in (block, plain):
            inner = b.norm.forward
            b.norm.forward = lambda y, inner=inner: checkpoint(inner, y, use_reentrant=reentrant)  # type: ignore
    all_results = []
    for b in (block, plain):
        leaf = x.clone().requires_grad_()
        z = checkpoint(b, leaf, use_reentrant=reentrant) if part == "block" else b(leaf)
        z.backward(torch.ones_like(z) * 0.5)
        all_results.append([z, leaf.grad, *(p.grad for p in b.parameters()), *b.buffers()])
    for ours, theirs in zip(*all_results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_without_gradients(context: Callable[[], Any], computed: list[PendingNorm]) -> None:
    block, plain, x = converted(), converted(fuse=False), images()
    for training in (True, False):
        block.train(training)
        plain.train(training)
        with context():
            z = block(x)
            assert torch.equal(z, plain(x))
        assert not z.requires_grad
    torch.testing.assert_close(block.state_dict(), plain.state_dict())
    assert not computed


@pytest.mark.parametrize("traced", [True, False], ids=["traced_with_gradients", "traced_without"])
def test_gradient_switched_on_in_between(traced: bool) -> None:
    block, x = converted(), images()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block
            self.with_gradient = traced

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.with_gradient):
                y = self.block.norm(self.block.conv(x))
            return torch.relu(y + x)

    outer = Outer()
    fk.densify_(block)
    mask = torch.rand(4, 4, 3, 3) < 0.3
    fused, plain = (fk.sparsify(outer, {"block.conv": mask}, fuse=fuse) for fuse in (True, False))
    if traced:  # otherwise the norm and its reader lie in different gradient modes, and nothing waits
        assert type(fused.block.norm) is DeferrableBatchNorm2d
    gradients = []
    for model in (fused, plain):
        model.with_gradient = False
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        gradients.append(leaf.grad)
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("residual", ["contiguous", "float32"])
def test_another_kind_of_residual(residual: str) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.relu(y + (x.contiguous() if residual == "contiguous" else x.float()))

    model = Other().double()
    mask = torch.rand(4, 4, 3, 3) < 0.3
    x = images()
    fused, plain = (fk.sparsify(model, {"conv": mask}, fuse=fuse) for fuse in (True, False))
    ours, theirs = results(fused, x), results(plain, x)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_other_inputs_take_torch_s_path() -> None:
    block, x = converted(), images()
    bare = fk.nn.BatchLastBatchNorm2d
    block.conv = nn.Conv2d(4, 4, 1).double()  # hands on what torch does
    plain = copy.deepcopy(block)
    plain.norm.__class__ = bare
    assert torch.equal(block(x.contiguous()), plain(x.contiguous()))
