# SPDX-License-Identifier: Apache-2.0
"""Rounding to bfloat16 and widening, bit for bit, and the one copy that all who keep a tensor share."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk
from fedpai_kernels import memory
from fedpai_kernels.ops import stored as module
from fedpai_kernels.ops.stored import check_activation_dtype, stored, stores, widened

ops = torch.ops.fedpai


def edges() -> Tensor:
    """Every upper half of a float, with the lower halves at which rounding changes its mind."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    bits = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return bits.to(torch.int32).view(torch.float32).flatten()


def as_bits(t: Tensor) -> Tensor:
    return t.view(torch.int16)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_edge_is_rounded_as_torch_does(
    isa: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    x = edges()
    y = ops.round_to_bf16(x)
    number = ~x.isnan()
    assert torch.equal(as_bits(y)[number], as_bits(x.to(torch.bfloat16))[number])
    assert torch.equal(y.isnan(), x.isnan())  # whose other bits differ among torch's own code paths
    assert torch.equal(ops.widen_bf16(y).view(torch.int32)[number], y.float().view(torch.int32)[number])
    assert torch.equal(ops.widen_bf16(y).isnan(), x.isnan())


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 4097, 200_001])
def test_every_length(isa: str, size: int) -> None:
    x = torch.randn(size) * torch.logspace(-42, 38, size)
    y = ops.round_to_bf16(x)
    assert torch.equal(as_bits(y), as_bits(x.to(torch.bfloat16)))
    assert torch.equal(ops.widen_bf16(y), y.float())


@pytest.mark.parametrize(
    "make",
    [fk.to_batch_last, Tensor.contiguous, lambda x: x[:, ::2], lambda x: x[:1].expand(6, -1, -1, -1)],
)
def test_strides(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.randn(6, 4, 3, 5))
    y = stored(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x.to(torch.bfloat16))
    assert y.is_contiguous() == x.is_contiguous() or fk.layout.is_batch_last(y)
    assert torch.equal(widened(y), y.float())
    assert widened(y).stride() == y.stride()
    assert widened(x) is x


@pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")
def test_copies_lie_in_cached_memory() -> None:
    x = fk.to_batch_last(torch.randn(16, 64, 32, 32))
    live = fk.memory_stats().live_bytes
    y = stored(x)
    assert 2 * x.numel() <= fk.memory_stats().live_bytes - live < 2.6 * x.numel()
    del y
    assert fk.memory_stats().live_bytes == live


def test_one_copy_that_goes_with_its_last_holder() -> None:
    x = torch.randn(4, 3, 5, 5)
    first = stored(x)
    assert stored(x) is first
    del first
    assert module._COPIES[id(x)].copy() is None
    again = stored(x)
    assert torch.equal(again, x.to(torch.bfloat16))
    key = id(x)
    del x
    assert key not in module._COPIES
    assert again.dtype == torch.bfloat16  # it lives on


def test_no_tensor_is_left_in_the_table() -> None:
    gc.collect()
    before = len(module._COPIES)
    for _ in range(20):
        stored(torch.randn(2, 2, 2, 2))
    assert len(module._COPIES) == before


def test_a_changed_tensor_has_another_copy() -> None:
    x = torch.randn(4, 3, 5, 5)
    old = stored(x)
    assert old._version == x._version
    before = old.clone()
    x.mul_(3)
    assert old._version == x._version
    new = stored(x)
    assert new is not old
    assert torch.equal(new, x.to(torch.bfloat16))
    assert torch.equal(old, before)


def test_a_tensor_with_a_copy_is_copied_and_pickled() -> None:
    x = torch.randn(4, 3)
    kept = stored(x)
    assert torch.equal(copy.deepcopy(x), x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file), x)
    assert kept.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int8, "bf16", 16, True])
def test_other_dtypes_are_refused_by_name(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"^activation_dtype: expected None .* or torch\.bfloat16, got"):
        check_activation_dtype(dtype)  # type: ignore[arg-type]


def test_when_it_stores() -> None:
    x, dtype = torch.randn(3, 4), torch.bfloat16
    assert stores(x, dtype)
    assert stores(torch.nn.Parameter(x), dtype)
    assert not stores(x, None)
    with torch.no_grad():
        assert not stores(x, dtype)
    with torch.inference_mode():
        kept_by_nobody = torch.randn(3, 4)
        assert not stores(kept_by_nobody, dtype)
    assert not stores(kept_by_nobody, dtype)
    seen = []
    torch.func.vmap(lambda row: (seen.append(stores(row, dtype)), row)[1])(x)
    assert seen == [False]
    for other in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"activation_dtype: torch.bfloat16 .* got x of dtype {other}"):
            stores(x.to(other), dtype)


@pytest.mark.parametrize("op", [ops.round_to_bf16, ops.widen_bf16])
def test_opcheck(op: object) -> None:
    x = fk.to_batch_last(torch.randn(6, 4, 3, 5))
    x = x.to(torch.bfloat16) if op is ops.widen_bf16 else x
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.default, (x,), test_utils=tests)  # type: ignore[attr-defined]
