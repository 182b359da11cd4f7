# SPDX-License-Identifier: Apache-2.0
"""Which channels go: exact sets, for small networks whose unused channels can be told by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fedpai_kernels as fk
from fedpai_kernels.nn import parts_of
from tests.nn.compaction import apply, check_same
from tests.nn.small import fingerprint


def full(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.ones_like(m.weight, dtype=torch.bool)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


def convert(model: nn.Module, masks: dict[str, Tensor], **options: Any) -> tuple[nn.Module, fk.Report]:
    """A converted copy of a model whose weights are made zero outside of the masks."""
    model.double()
    apply(model, masks)
    compacted = copy.deepcopy(model)
    return compacted, fk.sparsify_(compacted, masks, **{"compact": True, **options})


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the original weights' places that are left, layer by layer."""
    return {
        name: tuple(m.plan.mask_shape)
        for name, m in model.named_modules()
        if isinstance(m, fk.nn.PackedWeight)
    }


def chain(*between: nn.Module, bias: bool = False) -> nn.Sequential:
    first, second = nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.Conv2d(6, 4, 3, bias=bias)
    return nn.Sequential(first, *between, second, nn.Flatten(), nn.Linear(64, 5))


def images(side: int = 6) -> Tensor:
    return torch.randn(4, 3, side, side, dtype=torch.float64)


CARRIERS: dict[str, tuple[nn.Module, ...]] = {
    "nothing": (),
    "norm": (nn.BatchNorm2d(6), nn.ReLU()),
    "instance norm": (nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU()),
    "activations": (nn.SiLU(), nn.Sigmoid(), nn.Hardtanh(1, 2), nn.Softplus()),
    "dropout": (nn.Dropout(0.0), nn.Dropout2d(0.0), nn.Identity()),
    "pooling": (
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(3, 1, 1),
        nn.AdaptiveAvgPool2d(6),
        nn.AdaptiveMaxPool2d(6),
    ),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU6()),
}


@pytest.mark.parametrize("between", CARRIERS)
def test_unread_channels_go(between: str) -> None:
    model = chain(*copy.deepcopy(CARRIERS[between]))
    masks = full(model)
    last = str(len(CARRIERS[between]) + 1)
    masks[last][:, [1, 4]] = False
    compacted, report = convert(model, masks)
    kept = [0, 2, 3, 5]
    assert report["0"].shape == (4, 3, 3, 3)
    assert report["0"].original_shape == (6, 3, 3, 3)
    assert report[last].shape == (4, 4, 3, 3)
    for tensor in ("weight", "bias"):
        for name, module in list(compacted.named_children())[1:-3]:
            if getattr(module, tensor, None) is not None:
                held = parts_of(module, tensor)[0][0]
                per_channel = getattr(model.get_submodule(name), tensor)[0].numel()
                assert held.view(4, -1)[:, 0].tolist() == [per_channel * c for c in kept]
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "between", [(nn.GroupNorm(2, 6),), (nn.Softmax(1),), (nn.Hardtanh(), nn.LayerNorm(6))]
)
def test_what_looks_at_all_channels_keeps_them(between: tuple[nn.Module, ...]) -> None:
    model = chain(*between)
    masks = full(model)
    masks[str(len(between) + 1)][:, [1, 4]] = False
    compacted, report = convert(model, masks)
    assert all(row.original_shape is None for row in report)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


def test_channels_that_are_zero_go_with_the_weights_that_read_them() -> None:
    model = chain(nn.ReLU())
    masks = full(model)
    masks["0"][[0, 3]] = False
    model.double()
    before = model[2].weight.detach().clone()
    compacted, report = convert(model, masks)
    assert report["2"].shape == (4, 4, 3, 3)
    (held, _), (positions, aside) = parts_of(compacted[2], "weight")
    assert len(held) + len(positions) == before.numel()
    assert torch.equal(aside, before.reshape(-1)[positions])
    assert torch.equal(compacted.state_dict()["2.weight"], before)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "between", [(nn.BatchNorm2d(6),), (nn.Sigmoid(),), (nn.Conv2d(6, 6, 1, groups=6),), (nn.Hardtanh(1, 2),)]
)
def test_channels_that_become_something_of_nothing_stay(between: tuple[nn.Module, ...]) -> None:
    model = chain(*between)
    masks = full(model)
    masks["0"][[0, 3]] = False
    compacted, report = convert(model, masks)
    assert all(row.original_shape is None for row in report)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)
    biased = chain(nn.ReLU(), bias=True)
    masks = full(biased)
    masks["0"][[0, 3]] = False
    assert all(row.original_shape is None for row in convert(biased, masks)[1])


def test_what_goes_takes_more_along() -> None:
    """Backwards and forwards until nothing changes."""
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8, bias=False), nn.Tanh())))
    masks = {str(2 * i): torch.eye(8, dtype=torch.bool) for i in range(4)}
    masks["0"][0, 0] = False  # the first unit is zero in all layers
    masks["6"][:, 1] = False  # nobody reads the second one
    compacted, report = convert(model, masks)
    assert shapes(compacted) == {"0": (6, 8), "2": (6, 6), "4": (6, 6), "6": (8, 6)}
    assert report.notes[0] == "compacted: 6 of 32 channels removed in '0', '2', '4'"
    check_same(model, compacted, torch.randn(5, 8, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_pixels_of_a_channel_go_together() -> None:
    model = chain()
    masks = full(model)
    masks["3"].view(5, 4, 16)[:, [0, 2]] = False
    masks["3"].view(5, 4, 16)[:, 1, 1:] = False  # one pixel is read
    compacted, _ = convert(model, masks)
    assert shapes(compacted) == {"0": (6, 3, 3, 3), "1": (2, 6, 3, 3), "3": (5, 32)}
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


class Residual(nn.Module):
    """Two branches and a shortcut; `join` and `flatten` are spelled by the test."""

    def __init__(self, join: Callable[..., Tensor], flatten: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)
        self.join, self.flatten = join, flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.join(x, self.second(F.max_pool2d(self.first(x), 3, 1, 1)))
        return self.head(self.flatten(F.adaptive_avg_pool2d(x, 1)))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    b += a
    return b


JOINS = {
    "+": lambda a, b: a + b,
    "+=": in_place,
    "torch.add": torch.add,
    "minus": lambda a, b: a - 2 * b,
    "times": lambda a, b: a * torch.sigmoid(b),
}
FLATTENS = {
    "method": lambda x: x.flatten(1),
    "function": lambda x: torch.flatten(x, start_dim=1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "view of sizes": lambda x: x.view((x.size()[0], -1)),
    "mean": lambda x: x.mean([2, 3]),
    "sum": lambda x: torch.sum(x, dim=(-2, -1)),
}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("flatten", FLATTENS)
def test_residual_groups_and_spellings(join: str, flatten: str) -> None:
    model = Residual(JOINS[join], FLATTENS[flatten])
    masks = full(model)
    masks["second"][torch.rand(masks["second"].shape) < 0.5] = (
        False  # a dense layer's result takes no sum in place
    )
    masks["head"][:, [0, 1]] = False
    masks["first"][:, [1, 2]] = False  # so only channel 1 is read nowhere
    compacted, report = convert(model, masks)
    expected = {"stem": (5, 3, 1, 1), "first": (6, 5, 3, 3), "second": (5, 6, 1, 1), "head": (5, 5)}
    assert shapes(compacted) == expected
    assert compacted.norm.num_features == 5
    assert "compacted: 2 of 23 channels removed in 'stem', 'second'" in report.notes
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


def test_a_branch_of_which_nothing_would_be_left_stays() -> None:
    model = Residual(JOINS["+"], FLATTENS["method"])
    masks = full(model)
    masks["first"][3:] = False
    masks["second"][:, :3] = False  # reads what the first never writes, but its bias
    compacted, _ = convert(model, masks)
    assert shapes(compacted)["first"] == (6, 6, 3, 3)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


def test_masks_of_prune_and_exact_zeros() -> None:
    for as_prune in (True, False):
        model = chain(nn.BatchNorm2d(6)).double()
        mask = torch.ones(4, 6, 3, 3, dtype=torch.bool)
        mask[:, 2] = False
        apply(model, {"2": mask})
        dense = copy.deepcopy(model)
        if as_prune:
            prune.custom_from_mask(model[2], "weight", mask)
        fk.sparsify_(model, compact=True)
        assert model[0].out_channels == model[1].num_features == model[2].in_channels == 5
        check_same(dense, model, images(), rtol=1e-9, atol=1e-9)


def test_the_report_shows_both_shapes() -> None:
    model = chain()
    masks = full(model)
    masks["1"][:, 0] = False
    _, report = convert(model, masks)
    assert "5x3x3x3 of 6x3x3x3" in str(report)
    assert '"original_shape": [6, 3, 3, 3]' in report.to_json()
    assert "compacted: 1 of 15 channels removed in '0'" in report.notes
    assert report["3"].original_shape is None


def test_off() -> None:
    model = chain()
    masks = full(model)
    masks["1"][:, 0] = False
    compacted, _ = convert(model, masks)
    fk.sparsify_(compacted, compact=False)
    assert compacted[0].mask.shape == (6, 3, 3, 3)
    assert torch.equal(compacted[1].mask, masks["1"])
    assert torch.equal(compacted[1].weight, model[1].weight)


def test_twice_changes_nothing() -> None:
    model = chain(nn.BatchNorm2d(6), nn.ReLU())
    masks = full(model)
    masks["3"][:, 0] = False
    compacted, _ = convert(model, masks)
    before = fingerprint(compacted)
    fk.sparsify_(compacted, activation_dtype=None, compact=True)
    assert fingerprint(compacted) == before
    fk.sparsify_(compacted, {"3": masks["3"]}, compact=True)
    assert compacted[0].out_channels == 5
