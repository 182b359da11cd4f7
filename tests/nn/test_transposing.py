# SPDX-License-Identifier: Apache-2.0
"""Changes of layout by the transposing kernel, and where torch copies instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fedpai_kernels as fk
from fedpai_kernels import layout

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
CONVERSIONS = pytest.mark.parametrize("convert", [fk.to_batch_last, fk.to_contiguous])


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element another number."""
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def stored_last(x: Tensor) -> Tensor:
    """`x` in batch-last storage, by torch."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def check(x: Tensor) -> None:
    """Both ways, with the bits, the storage, and nothing written beyond it."""
    there = fk.to_batch_last(x)
    assert fk.is_batch_last(there)
    assert torch.equal(there, x)
    back = fk.to_contiguous(stored_last(x))
    assert back.is_contiguous()
    assert torch.equal(back, x)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each call of the kernel."""
    calls: list[torch.dtype] = []

    def counted(dtype: torch.dtype, transpose: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: int) -> None:
            calls.append(dtype)
            transpose(*arguments)

        return call

    monkeypatch.setattr(layout, "_TRANSPOSE", {t: counted(t, f) for t, f in layout._TRANSPOSE.items()})
    return calls


# ------------------------------------------------------------------------------------------------------- shapes


@DTYPES
def test_every_small_matrix(isa: str, dtype: torch.dtype) -> None:
    for rows in [*range(1, 36), 63, 64, 65, 70]:
        for columns in [*range(1, 19), 31, 33, 64, 127, 128, 129, 255, 257, 300]:
            check(numbered(rows, columns, dtype=dtype))


@DTYPES
def test_random_images(isa: str, dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    @settings(deadline=None, derandomize=True, database=None, max_examples=150)
    @given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 15), st.integers(1, 15), st.integers(1, 3))
    def random_images(batch: int, channels: int, height: int, width: int, threads: int) -> None:
        set_threads(threads)
        check(numbered(batch, channels, height, width, dtype=dtype))

    random_images()


@DTYPES
def test_views_that_are_misaligned_and_neighbours_that_stay(isa: str, dtype: torch.dtype) -> None:
    for shape in ((17, 33), (9, 3, 5, 4)):
        for offset in range(1, 5):
            sea = torch.full((2000,), -1, dtype=dtype)
            x = sea[offset : offset + torch.Size(shape).numel()].view(shape)
            x.copy_(numbered(*shape, dtype=dtype))
            check(x)
            assert (sea == -1).sum() == 2000 - x.numel()


@DTYPES
def test_bits_are_kept(isa: str, dtype: torch.dtype) -> None:
    """Negative zero, denormals, infinities and NaN with their payloads."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (37, 61), dtype=integer)
    x = bits.view(dtype)
    assert torch.equal(fk.to_batch_last(x).contiguous().view(integer), bits)
    assert torch.equal(fk.to_contiguous(stored_last(x)).view(integer), bits)


# ------------------------------------------------------------------------------------------- whose copy it is


@DTYPES
def test_the_kernel_copies_what_lies_without_gaps(dtype: torch.dtype, kernel_calls: list[torch.dtype]) -> None:
    x = numbered(5, 3, 4, 2, dtype=dtype)
    check(x)
    check(numbered(5, 7, dtype=dtype))
    assert kernel_calls == [dtype] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, kernel_calls: list[torch.dtype]) -> None:
    for shape in ((5, 3, 4, 2), (7, 9)):
        check(torch.randint(0, 2, shape).to(dtype))
    assert kernel_calls == []


@DTYPES
def test_other_strides_are_left_to_torch(dtype: torch.dtype, kernel_calls: list[torch.dtype]) -> None:
    x = numbered(6, 4, 5, 3, dtype=dtype)
    for view in (
        x.contiguous(memory_format=torch.channels_last), x[:, ::2], x[::2, 1:], x.transpose(2, 3),
        x[:1].expand(6, 4, 5, 3), x[:, :, :, 0].unsqueeze(3)[..., [0, 0]].transpose(1, 3), numbered(6, 8)[:, 1::2],
    ):  # fmt: skip
        kernel_calls.clear()
        y = fk.to_batch_last(view)
        assert fk.is_batch_last(y)
        assert torch.equal(y, view)
        z = fk.to_contiguous(view)
        assert z.is_contiguous()
        assert torch.equal(z, view)
        assert view.is_contiguous() or kernel_calls == []


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (3, 0, 4, 2), (0, 5), (5, 0)], ids=str)
def test_nothing_to_copy(shape: tuple[int, ...], kernel_calls: list[torch.dtype]) -> None:
    check(torch.zeros(shape))
    assert kernel_calls == []


# --------------------------------------------------------------------------------------- torch's other worlds


@CONVERSIONS
def test_meta_and_fake_tensors(convert: Callable[[Tensor], Tensor], kernel_calls: list[torch.dtype]) -> None:
    for shape in ((5, 3, 4, 2), (7, 9)):
        x = torch.randn(shape)
        x = x if convert is fk.to_batch_last else stored_last(x)
        expected = convert(x).stride()
        kernel_calls.clear()
        for shapes_only in (x.to("meta"), FakeTensorMode().from_tensor(x)):
            y = convert(shapes_only)
            assert (tuple(y.shape), y.stride()) == (shape, expected)
            assert y.device == shapes_only.device
    assert kernel_calls == []


@CONVERSIONS
def test_function_transforms(convert: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 3, 4, 2)
    x = x if convert is fk.to_batch_last else stored_last(x)

    def loss(t: Tensor) -> Tensor:
        return (convert(t) ** 3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), 3 * x**2)
    found: Any = torch.func.vjp(convert, x)
    y, pull = found
    assert torch.equal(y, x)
    assert torch.equal(pull(2 * x)[0], 2 * x)
    # There is no rule for it.
    with pytest.raises(RuntimeError, match=r"vmap over _To(BatchLast|Contiguous), but it does not have vmap support"):
        torch.func.vmap(convert)(torch.stack([x, x, x]) if convert is fk.to_batch_last else x.expand(3, *x.shape))


@CONVERSIONS
def test_traces_hold_for_other_numbers(convert: Callable[[Tensor], Tensor]) -> None:
    x, z = torch.randn(5, 3, 4, 2), torch.randn(5, 3, 4, 2)
    if convert is fk.to_contiguous:
        x, z = stored_last(x), stored_last(z)
    graph = make_fx(lambda t: convert(t) + 1)(x)
    assert torch.equal(graph(z), z + 1)


@CONVERSIONS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(convert: Callable[[Tensor], Tensor], dynamic: bool, kernel_calls: list[torch.dtype]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda t: convert(t * 2) + 1, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((5, 3, 4, 2), (7, 9), (6, 3, 4, 2)):
        x = torch.randn(shape)
        x = (x if convert is fk.to_batch_last else stored_last(x)).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, x * 2 + 1)
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full(shape, 2.0))
    assert kernel_calls == []
    torch.compiler.reset()


@CONVERSIONS
def test_gradients_come_back_by_the_kernel(
    convert: Callable[[Tensor], Tensor], isa: str, kernel_calls: list[torch.dtype]
) -> None:
    x = numbered(17, 5, 3, 7, dtype=torch.float64)
    x = (x if convert is fk.to_batch_last else stored_last(x)).requires_grad_()
    y = convert(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dy)
    assert dx.stride() == x.stride()
    assert kernel_calls == [torch.float64] * 2
    with torch.inference_mode():
        assert torch.equal(convert(x.detach()), x)
