# SPDX-License-Identifier: Apache-2.0
"""Networks with structured masks, converted: what the report says, and training as the dense-masked network does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import SparseConv2d, SparseLinear
from tests.cases import Conv2dCase, LinearCase
from tests.masks import make_mask
from tests.nn.small import train

LR = 0.05


class ConvNet(nn.Module):
    """Norms behind convolutions and before them, a shortcut, a stride, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, stride=2, groups=2)
        self.norm3 = nn.BatchNorm2d(24)
        self.mix = nn.Conv2d(24, 20, 1)
        self.head = nn.Linear(20, 5)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.bias)  # a channel without weights is constant, and must not lie on the ReLU's edge

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        x = self.relu(self.norm2(self.conv1(x)) + x)
        x = self.relu(self.norm3(self.conv2(x)))
        return self.head(self.mix(x).mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 6 * 6, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 5)
    )


# By layer; what else is changed in a mask is as tests/masks.py says.
STRUCTURES = {
    "16x1": {"stem": "16x1", "conv1": "16x1", "conv2": "4x1", "mix": "4x1", "head": "5x1"},
    "8x8-taps": {"stem": "8x3-taps", "conv1": "8x8-taps", "conv2": "4x4-taps", "mix": "8x8", "head": "5x4"},
    "lost": {"stem": "16x3 lost", "conv1": "8x8 lost", "conv2": "12x4 lost", "mix": "4x4 lost", "head": "5x4 lost"},
    "shuffled": {"conv1": "8x4 shuffled", "conv2": "12x4", "mix": "4x8 shuffled"},
    "channel": {"stem": "channel", "conv1": "channel", "conv2": "channel", "mix": "channel"},
}  # fmt: skip
OF_MLP = {
    "8x8": {"1": "8x8", "3": "8x8", "5": "5x3"},
    "1x4": {"1": "1x4", "3": "1x4", "5": "1x4"},
    "lost": {"1": "16x4 lost", "3": "8x8 lost", "5": "5x8 lost"},
}


def masks_of(model: nn.Module, structures: dict[str, str], density: float = 0.4) -> dict[str, Tensor]:
    """Random masks of `structures` for the layers; other weights are set to zero."""
    masks = {}
    for name, structure in structures.items():
        layer = model.get_submodule(name)
        case: Conv2dCase | LinearCase
        if isinstance(layer, nn.Conv2d):
            case = Conv2dCase(
                name, density, structure, in_channels=layer.in_channels, out_channels=layer.out_channels,
                kernel=(layer.kernel_size[0], layer.kernel_size[1]), groups=layer.groups,
            )  # fmt: skip
        else:
            assert isinstance(layer, nn.Linear)
            case = LinearCase(
                name, density, structure, in_features=layer.in_features, out_features=layer.out_features
            )
        masks[name] = make_mask(case)
        with torch.no_grad():
            layer.weight.mul_(masks[name])
    return masks


def batches(count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Images whose class shows in their brightness."""
    made = []
    for _ in range(count):
        y = torch.randint(0, 5, (11,))
        made.append((torch.randn(11, 3, 6, 6, dtype=dtype) + 2 * y.view(-1, 1, 1, 1), y))
    return made


CASES = [
    *(pytest.param(ConvNet, structures, id=f"conv-{name}") for name, structures in STRUCTURES.items()),
    *(pytest.param(mlp, structures, id=f"mlp-{name}") for name, structures in OF_MLP.items()),
]


@pytest.mark.parametrize(("network", "structures"), CASES)
def test_training_is_that_of_the_dense_masked_network(
    network: Callable[[], nn.Module], structures: dict[str, str], isa: str
) -> None:
    dense = network().double()
    masks = masks_of(dense, structures, density=0.3)
    sparse = fk.sparsify(dense, masks, compact=False)
    for name, mask in masks.items():
        layer = sparse.get_submodule(name)
        assert isinstance(layer, (SparseConv2d, SparseLinear))
        assert torch.equal(layer.mask, mask)
    data = batches(12, torch.float64)
    expected, losses = train(dense, data, masks, lr=LR), train(sparse, data, lr=LR)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert min(losses) < losses[0]
    state = sparse.state_dict()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-8)
    for name, mask in masks.items():
        assert (state[f"{name}.weight"][~mask] == 0).all()  # weights in the gaps of panels too


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_fused_norms_keep_every_bit(structures: dict[str, str], isa: str, walk: str) -> None:
    model = ConvNet()
    masks = masks_of(model, structures)
    fused, separate = (fk.sparsify(model, masks, fuse=fuse, compact=False) for fuse in (True, False))
    data = batches(4, torch.float32)
    assert train(fused, data, lr=LR) == train(separate, data, lr=LR)
    for (name, one), other in zip(fused.state_dict().items(), separate.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_twice(threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    model = ConvNet()
    sparse = fk.sparsify(model, masks_of(model, STRUCTURES["lost"]), compact=False)
    data = batches(4, torch.float32)
    first, second = copy.deepcopy(sparse), copy.deepcopy(sparse)
    assert train(first, data, lr=LR) == train(second, data, lr=LR)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_report_says_the_structure_and_the_kernel() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 32, 1), nn.Flatten(),
        nn.Linear(32 * 4, 64), nn.Linear(64, 24),
    )  # fmt: skip
    structures = {"0": "16x1", "2": "8x8-taps", "3": "4x4", "5": "16x16", "6": "1x8"}
    report = fk.sparsify_(model, masks_of(model, structures, 0.3), compact=False)
    assert {row.name: row.structure for row in report} == structures
    assert {row.kernel for row in report} == {"sparse"}
    for row in report:
        assert row.structure in next(line for line in str(report).splitlines() if line.startswith(row.name))
    x = torch.randn(3, 8, 6, 6)
    again = fk.sparsify_(model, {}, compact=False)
    assert {row.name: row.structure for row in again} == structures
    assert model(x).shape == (3, 24)


@pytest.mark.parametrize(
    ("declared", "structures"),
    [
        ("16x1", {"stem": "16x1", "conv1": "16x1", "conv2": "12x1", "mix": "16x1", "head": "5x1"}),
        ("8x8-taps", {"stem": "8x3-taps", "conv1": "8x8-taps", "mix": "8x8", "head": "5x8"}),
        ("4x4", {"conv1": "4x4", "conv2": "12x4", "mix": "4x8"}),
        ("channel", STRUCTURES["channel"]),
        ("weight", STRUCTURES["lost"]),
        ("auto", STRUCTURES["lost"]),
    ],
)
def test_declared_structures(declared: str, structures: dict[str, str]) -> None:
    """Those that hold, layers smaller than a block included; the model is the one that nothing was declared of."""
    model = ConvNet()
    masks = masks_of(model, structures)
    found, declaredly = fk.sparsify(model, masks), fk.sparsify(model, masks, structure=declared)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(found(x), declaredly(x))


@pytest.mark.parametrize(
    ("declared", "changed", "message"),
    [
        ("16x1", "conv1", r"^masks\['conv1'\]: structure: the mask is not 16x1: the block of output"),
        ("5x4", "head", r"^masks\['stem'\]: structure: the mask is not 5x3"),
        ("64x64", None, "^structure: a block of 64x64 is larger than every layer"),
        ("2:4", None, r"^masks\['conv1'\]: structure: the mask is not 2:4"),
        ("16*1", None, r"^structure: got '16\*1', expected 'weight'"),
    ],
)
def test_masks_of_another_structure_are_refused(declared: str, changed: str | None, message: str) -> None:
    model = ConvNet()
    masks = masks_of(model, STRUCTURES["16x1"])
    if changed is not None:
        position = masks[changed].nonzero()[0].tolist()
        masks[changed][tuple(position)] = False
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        fk.sparsify_(model, masks, structure=declared)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_layers_narrower_than_an_m_are_all_edge() -> None:
    masks = {"stem": torch.tensor([True, False, True]).view(1, 3, 1, 1).expand(16, 3, 3, 3).clone()}
    fk.sparsify(ConvNet(), masks, structure="2:4")
    with pytest.raises(ValueError, match=r"^masks\['stem'\]: structure: .*1:3"):
        fk.sparsify(ConvNet(), masks, structure="1:4")
