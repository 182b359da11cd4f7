# SPDX-License-Identifier: Apache-2.0
"""Where torch traces, fakes, transforms or fills what is allocated, its own allocation is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fedpai_kernels as fk
from fedpai_kernels import memory, memory_stats

pytestmark = pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")

SHAPE = (32, 64, 16, 16)


def empty() -> Tensor:
    return fk.empty_batch_last(SHAPE, dtype=torch.float32, device="cpu")


def served() -> int:
    stats = memory_stats()
    return stats.hits + stats.misses


@pytest.fixture
def untouched() -> Iterator[None]:
    before = served()
    yield
    assert served() == before


@pytest.fixture
def convolve() -> Callable[[Tensor], Tensor]:
    plan = fk.Plan.from_mask(torch.rand(64, 64, 3, 3) < 0.1)
    values = torch.randn(plan.nnz)
    return lambda x: fk.ops.sparse_conv2d(x, values, plan, padding=1)


def test_the_cache_would_serve_it() -> None:
    before = served()
    empty()
    assert served() == before + 1


@pytest.mark.usefixtures("untouched")
def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        assert isinstance(empty(), FakeTensor)
        x = torch.empty(SHAPE)
        y = torch.ops.fedpai.adaptive_avg_pool2d(x, [16, 16, 1, 1, 0, 1], [16, 16, 1, 1, 0, 1])
    assert isinstance(y, FakeTensor)
    outside = torch.ops.fedpai.adaptive_avg_pool2d(
        mode.from_tensor(torch.empty(SHAPE)), [16, 16, 1, 1, 0, 1], [16, 16, 1, 1, 0, 1]
    )
    assert isinstance(outside, FakeTensor)


@pytest.mark.usefixtures("untouched")
def test_dispatch_modes() -> None:
    seen: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        empty()
    assert seen == [torch.ops.aten.empty_strided.default]


@pytest.mark.usefixtures("untouched")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_tracing_into_a_graph() -> None:
    graph = make_fx(lambda x: empty().copy_(x))(torch.ones(SHAPE))
    assert "empty_strided" in graph.code
    assert torch.equal(graph(torch.full(SHAPE, 2.0)), torch.full(SHAPE, 2.0))
    traced = torch.jit.trace(lambda x: empty().copy_(x), torch.ones(SHAPE), check_trace=False)
    assert torch.equal(traced(torch.full(SHAPE, 3.0)), torch.full(SHAPE, 3.0))


@pytest.mark.usefixtures("untouched")
def test_function_transforms() -> None:
    x = torch.randn(SHAPE)
    gradient = torch.func.grad(lambda x: (empty().copy_(x) * x).sum())(x)
    assert torch.equal(gradient, 2 * x)
    functional = torch.func.functionalize(lambda x: empty().copy_(x) + 1)(x)
    assert torch.equal(functional, x + 1)


def test_compiled(convolve: Callable[[Tensor], Tensor]) -> None:
    """The graph allocates with torch, for every batch size; the op in it from the cache."""
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        sink = fk.empty_batch_last(tuple(x.shape), dtype=x.dtype, device=x.device)
        return convolve(sink.copy_(x)) + 1

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (32, 48):
        x = torch.randn(batch, *SHAPE[1:])
        expected, before = function(x), served()
        assert torch.equal(compiled(x), expected)
        assert served() == before + 1


def test_the_op_passes_torchs_own_check(convolve: Callable[[Tensor], Tensor]) -> None:
    x = fk.to_batch_last(torch.randn(SHAPE)).requires_grad_()
    spec = [16, 8, 2, 2, 0, 1]
    torch.library.opcheck(torch.ops.fedpai.avg_pool2d.default, (x.detach(), spec, spec, True, 0))
    with FlopCounterMode(display=False):
        convolve(x).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("untouched")
def test_filling_of_uninitialised_memory() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert empty().isnan().all()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("untouched")
def test_default_device_and_dtype() -> None:
    with torch.device("meta"):
        assert fk.empty_batch_last(SHAPE).is_meta
    assert fk.empty_batch_last(SHAPE).dtype is torch.get_default_dtype()
