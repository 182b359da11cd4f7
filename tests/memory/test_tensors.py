# SPDX-License-Identifier: Apache-2.0
"""Tensors in cached memory, in the hands of torch: alike in everything but growing in place."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import multiprocessing as mp
from torch.multiprocessing.queue import SimpleQueue  # type: ignore[attr-defined]

from fedpai_kernels import empty_batch_last, memory, memory_stats

pytestmark = pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")

SHAPE = (32, 64, 16, 16)


def lent() -> Tensor:
    """A tensor in cached memory, of random numbers."""
    x = empty_batch_last(SHAPE, dtype=torch.float32, device="cpu")
    assert not x.untyped_storage().resizable()
    return x.normal_()


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, Tensor)
    return loaded


@pytest.mark.parametrize(
    "function",
    [copy.deepcopy, torch.clone, saved, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "clone", "save", "pickle"],
)
def test_copies_are_torchs(function: Callable[[Tensor], Tensor]) -> None:
    x = lent()
    before = memory_stats()
    y = function(x)
    assert torch.equal(x, y)
    assert x.stride() == y.stride()
    assert memory_stats() == before


def test_shared_memory() -> None:
    """`share_memory_` moves it, and gives the block back."""
    x = lent()
    expected, live = x.clone(), memory_stats().live_bytes
    x.share_memory_()
    assert x.is_shared()
    assert torch.equal(x, expected)
    assert memory_stats().live_bytes < live


def _double(inbox: SimpleQueue, outbox: SimpleQueue) -> None:
    torch.set_num_threads(1)
    x = inbox.get()
    y = empty_batch_last(SHAPE, dtype=torch.float32, device="cpu")
    torch.mul(x, 2, out=y)
    outbox.put(y)
    inbox.get()


def test_between_processes() -> None:
    """Sent to a forked process, which has a copy of the parent's cache, and back."""
    lent()  # leaves a cached block
    context = mp.get_context("fork")
    inbox, outbox = context.SimpleQueue(), context.SimpleQueue()
    child = context.Process(target=_double, args=(inbox, outbox))
    child.start()
    x = lent()
    expected = x * 2
    inbox.put(x)
    doubled = outbox.get()
    assert torch.equal(doubled, expected)
    inbox.put(None)
    child.join(60)
    assert child.exitcode == 0


def test_gradients_through_in_place_operations() -> None:
    x = lent()
    weight = torch.full((1,), 3.0, requires_grad=True)
    values, version = x.double().sum(), x._version
    x.mul_(weight)
    assert x._version > version
    x.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double().squeeze(), values, rtol=1e-3, atol=1e-2)
    leaf = lent().requires_grad_()
    leaf.square().sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * leaf.detach())


def test_result_of_an_operation() -> None:
    x = lent()
    assert torch.equal(torch.add(x, 1, out=lent()), x + 1)


def test_smaller_in_place() -> None:
    x = lent()
    assert torch.equal(x.resize_(4, 5), torch.as_strided(x, (4, 5), (5, 1)))


def test_cannot_grow_in_place() -> None:
    """The documented difference, an error that says so."""
    with pytest.raises(RuntimeError, match="not resizable"):
        lent().resize_(64, 64, 16, 16)


def test_other_storage_can_take_its_place() -> None:
    x = lent()
    live = memory_stats().live_bytes
    x.set_(torch.ones(3))
    assert torch.equal(x, torch.ones(3))
    assert memory_stats().live_bytes < live
