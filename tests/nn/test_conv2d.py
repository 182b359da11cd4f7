# SPDX-License-Identifier: Apache-2.0
"""Convolution modules in every geometry of nn.Conv2d, and the layouts they take and hand on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fedpai_kernels as fk
from fedpai_kernels.nn import BatchLastConv2d, MaskedConv2d, SparseConv2d

GEOMETRY: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "stride_2_odd_size": {"kernel_size": 3, "padding": 1, "stride": 2},
    "one_by_one": {"kernel_size": 1},
    "not_square": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "padding_larger_than_kernel": {"kernel_size": 2, "padding": 3},
    "same": {"kernel_size": 3, "padding": "same"},
    "same_even_kernel": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "no_bias": {"kernel_size": 3, "bias": False},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "circular_same_even_kernel": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("cls", [SparseConv2d, MaskedConv2d])
@pytest.mark.parametrize("settings", GEOMETRY.values(), ids=GEOMETRY.keys())
def test_geometry(cls: type[Any], settings: dict[str, Any]) -> None:
    dense = nn.Conv2d(4, 8, **settings).double()
    mask = torch.rand(dense.weight.shape) < 0.4
    mask[0] = False  # an output channel without weights
    with torch.no_grad():
        dense.weight.mul_(mask)
    layer = cls.from_dense(dense, mask)
    for layout in ("contiguous", "batch_last", "channels_last"):
        x = torch.randn(3, 4, 7, 9, dtype=torch.float64)
        x1 = x.clone().requires_grad_()
        if layout == "batch_last":
            x = fk.to_batch_last(x)
        elif layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x2 = x.requires_grad_()
        y1, y2 = dense(x1), layer(x2)
        torch.testing.assert_close(y2, y1)
        dense.zero_grad()
        layer.zero_grad()
        dy = torch.randn_like(y1)
        y1.backward(dy)
        y2.backward(dy)
        torch.testing.assert_close(x2.grad, x1.grad)
        torch.testing.assert_close(layer.values.grad, dense.weight.grad[mask])
        if dense.bias is not None:
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    torch.testing.assert_close(layer(x[0]), dense(x[0]))  # without a batch


def test_layouts_handed_on() -> None:
    x = torch.randn(5, 4, 6, 6)
    dense = nn.Conv2d(4, 8, 3)
    sparse, masked = SparseConv2d.from_dense(dense), MaskedConv2d.from_dense(dense)
    between = copy.deepcopy(dense)
    between.__class__ = BatchLastConv2d
    for source in (x, fk.to_batch_last(x)):
        assert fk.is_batch_last(sparse(source))
        assert fk.is_batch_last(between(source))
        assert masked(source).is_contiguous()
    masked.batch_last = True
    assert fk.is_batch_last(masked(x))
    for layer in (sparse, masked, between):  # gradients keep the layout of what they flow back to
        source = fk.to_batch_last(x).requires_grad_()
        layer(source).sum().backward()
        assert fk.is_batch_last(source.grad)


def test_batch_last_conv2d_is_nn_conv2d() -> None:
    dense = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect").double()
    layer = copy.deepcopy(dense)
    layer.__class__ = BatchLastConv2d
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(layer(fk.to_batch_last(x)), dense(x))
    assert torch.equal(layer(x[0]), dense(x[0]))


FULL = {
    "first": (nn.Conv2d(3, 8, 3, padding=1), True),
    "stride": (nn.Conv2d(4, 6, 3, stride=2, padding=(0, 2)), True),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), True),
    "groups": (nn.Conv2d(6, 9, 3, groups=3, bias=False), True),
    "depthwise": (nn.Conv2d(5, 5, 3, groups=5, padding=1), True),
    "channels_last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), True),
    "many_weights": (nn.Conv2d(34, 4, 3), False),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), False),
}


@pytest.mark.parametrize(("dense", "ours"), FULL.values(), ids=FULL.keys())
def test_batch_last_conv2d_by_either_kernel(dense: nn.Conv2d, ours: bool) -> None:
    dense = copy.deepcopy(dense).double()
    layer = copy.deepcopy(dense)
    layer.__class__ = BatchLastConv2d
    x = torch.randn(11, dense.in_channels, 9, 8, dtype=torch.float64)
    assert layer._is_ours(x) is ours
    for source in (x, fk.to_batch_last(x)):
        leaves = [source.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        y, expected = layer(leaves[0]), dense(leaves[1])
        torch.testing.assert_close(y, expected)
        assert fk.is_batch_last(y)
        dy = torch.randn_like(expected)
        layer.zero_grad()
        dense.zero_grad()
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for p, q in zip(layer.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert layer.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 3, 1, 1), (2, 2)], ids=str)
def test_batch_last_conv2d_refuses_as_torch_does(shape: tuple[int, ...]) -> None:
    dense = nn.Conv2d(3, 4, 3)
    layer = copy.deepcopy(dense)
    layer.__class__ = BatchLastConv2d
    with pytest.raises(RuntimeError) as theirs:
        dense(torch.randn(shape))
    with pytest.raises(RuntimeError) as ours:
        layer(torch.randn(shape))
    assert str(ours.value) == str(theirs.value)
