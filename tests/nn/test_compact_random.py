# SPDX-License-Identifier: Apache-2.0
"""Random networks under random masks: compacted or refused, as the gradients of the masked network say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fedpai_kernels as fk
from tests.nn.compaction import apply, check_same, step

KINDS = ("conv", "residual", "depthwise", "relu", "tanh", "norm", "instance norm", "pool", "group norm")


class Stack(nn.Module):
    """Layers of the kinds that are drawn, all of `channels` channels, then a flattening or a mean and a head."""

    def __init__(self, kinds: list[str], channels: int, bias: bool, flatten: bool) -> None:
        super().__init__()
        self.kinds, self.flatten = kinds, flatten
        self.stem = nn.Conv2d(2, channels, 1, bias=bias)
        self.layers = nn.ModuleList([self._layer(kind, channels, bias) for kind in kinds])
        self.head = nn.Linear(channels * (12 if flatten else 1), 3)

    @staticmethod
    def _layer(kind: str, channels: int, bias: bool) -> nn.Module:
        if kind == "residual":
            conv, other = (nn.Conv2d(channels, channels, 1, bias=bias) for _ in range(2))
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), other)
        made: dict[str, Any] = {
            "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            "depthwise": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias),
            "relu": nn.ReLU,
            "tanh": nn.Tanh,
            "norm": lambda: nn.BatchNorm2d(channels),
            "instance norm": lambda: nn.InstanceNorm2d(channels, affine=True),
            "pool": lambda: nn.MaxPool2d(3, 1, 1),
            "group norm": lambda: nn.GroupNorm(1, channels),
        }
        layer: nn.Module = made[kind]()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = x + layer(x) if kind == "residual" else layer(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    channels=st.integers(1, 6),
    bias=st.booleans(),
    flatten=st.booleans(),
    density=st.sampled_from([0.1, 0.3, 0.6]),
    seed=st.integers(0, 10**6),
)
def test_any_network(
    kinds: list[str], channels: int, bias: bool, flatten: bool, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Stack(kinds, channels, bias, flatten).double()
    masks = {}
    for name, module in model.named_modules():
        if isinstance(
            module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm
        ):  # no ReLU at zero, give or take
            nn.init.normal_(module.bias)
        if isinstance(module, nn.Conv2d | nn.Linear):
            mask = torch.rand(module.weight.shape) < density
            mask[torch.rand(len(mask)) < 0.3] = False
            mask[:, torch.rand(mask.shape[1]) < 0.3] = False
            mask.view(-1)[torch.randint(mask.numel(), ())] = True
            masks[name] = mask
    apply(model, masks)
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    try:
        compacted = fk.sparsify(model, masks, compact=True)
    except ValueError as error:
        assert "no path of kept weights leads through" in str(error)  # noqa: PT017
        assert not step(model.eval(), x)[1].any()
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in compacted.state_dict().items():
        assert torch.equal(value, before[key]), key
    check_same(model, compacted, x, rtol=1e-8, atol=1e-8)


def test_a_chain_is_refused_exactly_where_nothing_arrives() -> None:
    """Without biases that revive units and without branches, the gradient of the input says it all."""
    refused = 0
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
        masks = {str(i): torch.rand(4, 4) < 0.22 for i in range(4)}
        for mask in masks.values():
            mask[torch.randint(4, ()), torch.randint(4, ())] = True
        apply(model, masks)
        x = torch.randn(2, 4, dtype=torch.float64)
        if step(model, x)[1].any():
            check_same(model, fk.sparsify(model, masks, compact=True), x, rtol=1e-9, atol=1e-9)
        else:
            refused += 1
            with pytest.raises(ValueError, match="no path of kept weights"):
                fk.sparsify_(model, masks, compact=True)
    assert 5 < refused < 55
