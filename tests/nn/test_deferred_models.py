# SPDX-License-Identifier: Apache-2.0
"""Models whose batch norms wait for the sum after them: by hand, under hooks, copied, changed, in threads."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import BatchLastBatchNorm2d, DeferrableBatchNorm2d
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.blocks import Block, check_fused, converted, images, results


def test_called_by_hand_it_is_a_plain_norm() -> None:
    block, x = converted(), images()
    plain = copy.deepcopy(block.norm)
    plain.__class__ = BatchLastBatchNorm2d
    y = block.norm(x)
    assert type(y) is Tensor
    assert torch.equal(y, plain(x))
    assert type(block.forward(x)) is Tensor  # without the call, and so without the permit
    block(x)
    assert type(block.norm(x)) is Tensor


def test_an_error_in_between_leaves_no_permit() -> None:
    block, x = converted(), images()
    block.conv.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("stop")))
    with pytest.raises(ValueError, match="stop"):
        block(x)
    assert type(block.norm(x)) is Tensor


@pytest.mark.parametrize("where", ["norm", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_see_the_separate_steps(kind: str, where: str, computed: list[PendingNorm]) -> None:
    block, plain, x = converted(), converted(fuse=False), images()
    seen: list[list[Tensor]] = []
    for b in (block, plain):
        found: list[Tensor] = []
        seen.append(found)

        def hook(module: nn.Module, *tensors: Any, found: list[Tensor] = found) -> None:
            found += [
                t.detach().clone() for part in tensors for t in (part if isinstance(part, tuple) else (part,))
            ]

        module = b.get_submodule(where)
        if kind == "full_backward" and where == "relu":
            b.relu.inplace = False  # torch does not allow both
        getattr(module, f"register_{kind}_hook")(hook)
        results(b, x)
    assert seen[0]
    for ours, theirs in zip(*seen, strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs)
    assert not computed


def test_hooks_on_every_module_see_the_separate_steps() -> None:
    block, x = converted(), images()
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: names.append(f"{type(module).__name__} {type(y).__name__}")
    )
    try:
        block(x)
    finally:
        handle.remove()
    assert names == ["SparseConv2d Tensor", "DeferrableBatchNorm2d Tensor", "ReLU Tensor", "Block Tensor"]


def test_hooks_on_the_block_and_its_output() -> None:
    block, plain, x = converted(), converted(fuse=False), images()
    seen = []
    for b in (block, plain):
        found: list[Tensor] = []
        b.register_forward_hook(lambda m, args, z, found=found: found.append(z.detach().clone()))
        b.register_full_backward_hook(lambda m, dx, dz, found=found: found.extend((*dx, *dz)))
        results(b, x)
        seen.append(found)
    assert len(seen[0]) == 3
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_copies_and_pickles_stay_fused(computed: list[PendingNorm]) -> None:
    block = converted()
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        check_fused(twin)
        assert type(twin.norm) is DeferrableBatchNorm2d
    assert not computed


def test_a_norm_that_is_replaced_or_gone() -> None:
    block, x = converted(), images()
    block.norm = nn.BatchNorm2d(4).double()
    torch.testing.assert_close(block(x), torch.relu(copy.deepcopy(block.norm)(block.conv(x)) + x))
    block.norm = nn.Identity()
    assert torch.equal(block(x), torch.relu(block.conv(x) + x))
    block.relu = nn.Tanh()
    assert torch.equal(block(x), torch.tanh(block.conv(x) + x))
    del block._modules["norm"]
    object.__setattr__(block, "norm", lambda y: y)
    assert torch.equal(block(x), torch.tanh(block.conv(x) + x))


def test_another_activation() -> None:
    block, plain, x = converted(), converted(fuse=False), images()
    for b in (block, plain):
        b.relu = nn.Sigmoid()
    ours, theirs = results(block, x), results(plain, x)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_state_dicts_are_dense_and_densify_undoes_it() -> None:
    block, dense = converted(), Block().double()
    dense.load_state_dict(block.state_dict())
    block.load_state_dict(dense.state_dict())
    again = fk.densify_(copy.deepcopy(block))
    assert type(again.norm) is nn.BatchNorm2d
    assert not again._forward_hooks
    assert not again._forward_pre_hooks
    assert not again._forward_hooks_always_called
    x = images()
    torch.testing.assert_close(again(x), dense(x))


def test_converting_twice_changes_nothing() -> None:
    block = converted()
    fk.sparsify_(block, {"conv": block.conv.mask})
    assert len(block._forward_hooks) == len(block._forward_pre_hooks) == 1
    check_fused(block)


def test_threads_do_not_share_permits() -> None:
    block, x = converted().eval(), images()
    expected = block(x)
    kinds: list[type] = []
    block.between = lambda m, y: None
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        done.wait(10)

    handle = block.conv.register_forward_pre_hook(wait)
    worker_results: list[Tensor] = []
    worker = threading.Thread(target=lambda: worker_results.append(block(x).detach()))
    worker.start()
    assert inside.wait(10)  # the other thread holds a permit now
    kinds.append(type(block.norm(x)))
    done.set()
    worker.join()
    handle.remove()
    assert kinds == [Tensor]
    assert torch.equal(worker_results[0], expected)


def test_compiles() -> None:
    torch.compiler.reset()
    block, plain, x = converted(), converted(fuse=False), images()
    z = torch.compile(block, backend="aot_eager")(x)
    torch.testing.assert_close(z, plain(x))
    torch.compiler.reset()


def test_functional_call_and_per_sample_transforms() -> None:
    block, x = converted().eval(), images()
    parameters = {name: p * 2 for name, p in block.named_parameters()}
    z = torch.func.functional_call(block, parameters, (x,))
    plain = converted(fuse=False).eval()
    torch.testing.assert_close(z, torch.func.functional_call(plain, parameters, (x,)))
