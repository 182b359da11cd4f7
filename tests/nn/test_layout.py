# SPDX-License-Identifier: Apache-2.0
"""The batch-last layout: recognising it, converting to it and back, and what keeps it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


SHAPES = [
    (4, 3, 5, 6),
    (1, 3, 5, 6),
    (4, 1, 5, 6),
    (4, 3, 1, 1),
    (1, 1, 1, 1),
    (4, 3, 1, 6),
    (0, 3, 5, 6),
    (7, 9),
    (3, 4, 2, 5, 6),
    (1, 4, 3, 5, 2),
    (2, 1, 3, 2, 6),
    (0, 4, 3, 5, 6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_batch_last_agrees_with_the_definition(shape: tuple[int, ...]) -> None:
    order = {2: (1, 0), 4: (1, 2, 3, 0), 5: (0, 2, 3, 4, 1)}[len(shape)]
    x = torch.randn(shape)
    made = fk.empty_batch_last(shape)
    assert fk.is_batch_last(made)
    assert made.permute(order).is_contiguous()
    candidates = [x, made, x[..., :1], x[:1], x.transpose(-1, -2), x.expand(x.shape)]
    if len(shape) == 4:
        candidates += [
            x.contiguous(memory_format=torch.channels_last),
            batch_last(x)[:, ::2],
            batch_last(x)[::2],
        ]
    for t in candidates:
        assert fk.is_batch_last(t) == t.permute(order).is_contiguous(), (t.shape, t.stride())


def test_other_ranks_are_not_batch_last() -> None:
    assert not fk.is_batch_last(torch.zeros(3))
    assert not fk.is_batch_last(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_batch_last_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, shape).to(dtype)
    sources = [x, x.transpose(0, 1).contiguous().transpose(0, 1), x[..., ::2]]
    if x.dim() == 4:
        sources.append(x.contiguous(memory_format=torch.channels_last))
    for source in sources:
        y = fk.to_batch_last(source)
        assert fk.is_batch_last(y)
        assert y.dtype == dtype
        assert torch.equal(y, source)
        back = fk.to_contiguous(y)
        assert back.is_contiguous()
        assert torch.equal(back, source)


def test_nothing_is_copied_where_nothing_changes() -> None:
    x = fk.to_batch_last(torch.randn(4, 3, 5, 5))
    assert fk.to_batch_last(x) is x
    y = torch.randn(4, 3)
    assert fk.to_contiguous(y) is y
    assert fk.to_batch_last(x.flatten(1)).data_ptr() == x.data_ptr()  # flattening is free


@pytest.mark.parametrize("convert", [fk.to_batch_last, fk.to_contiguous])
@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (2, 3, 2, 1, 2), (3, 4)], ids=str)
def test_gradients(convert: object, shape: tuple[int, ...]) -> None:
    assert callable(convert)
    x = torch.randn(shape, dtype=torch.float64)
    for source in (x, fk.to_batch_last(x)):
        source = source.detach().requires_grad_()
        assert torch.autograd.gradcheck(convert, (source,))
        assert torch.autograd.gradgradcheck(convert, (source,))


def test_the_gradient_comes_back_in_the_layout_of_the_input() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(fk.to_batch_last(x), x, fk.to_batch_last(torch.randn(x.shape)))
    assert dx.is_contiguous()
    z = fk.to_batch_last(torch.randn(4, 3, 5, 5)).requires_grad_()
    (dz,) = torch.autograd.grad(fk.to_contiguous(z), z, torch.randn(z.shape))
    assert fk.is_batch_last(dz)


def test_images_of_clients_are_each_batch_last_and_all_together_too() -> None:
    x = fk.to_batch_last(torch.randn(2, 4, 3, 5, 6))
    assert x.stride() == (360, 1, 120, 24, 4)
    assert all(map(fk.is_batch_last, x))
    channels = x.transpose(0, 1).flatten(1, 2)
    assert fk.is_batch_last(channels)
    assert channels.data_ptr() == x.data_ptr()
    assert not fk.is_batch_last(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert fk.empty_batch_last(x.shape).stride() == x.stride()


def test_elementwise_operations_of_torch_keep_the_layout() -> None:
    x, y = (fk.to_batch_last(torch.randn(4, 3, 5, 6)).requires_grad_() for _ in range(2))
    for z in (torch.relu(x), x + y, x * 2, torch.nn.functional.silu(x), torch.relu_(x + 1)):
        assert fk.is_batch_last(z)
        (dx,) = torch.autograd.grad(z, x, torch.ones_like(z))
        assert fk.is_batch_last(dx)


@pytest.mark.parametrize("convert", [fk.to_batch_last, fk.to_contiguous])
def test_errors(convert: object) -> None:
    assert callable(convert)
    with pytest.raises(ValueError, match=r"expected a shape \(N, C, H, W\), .* or \(N, F\), got \(2, 3, 4\)"):
        convert(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        convert([1, 2])
    with pytest.raises(ValueError, match="empty_batch_last: shape"):
        fk.empty_batch_last((2, 3, 4))
