# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: sizes, their function, criteria, and training with sparse layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fedpai_kernels as fk
from fedpai import models, pruning


def small(**options: object) -> nn.Module:
    """One head of 64 channels."""
    return models.create("vit-tiny", width=0.1, image_size=8, seed=0, **options)


@pytest.mark.parametrize(("name", "channels"), [("vit-tiny", 192), ("vit-small", 384)])
def test_published_sizes(name: str, channels: int) -> None:
    with torch.device("meta"):
        model = models.create(name, num_classes=10, in_channels=3)
    blocks = 12 * 12 * channels**2
    found = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert found == blocks + (3 * 4 * 4 + 10) * channels
    assert model.positions.shape == (1, 64, channels)
    assert {m.heads for m in model.modules() if hasattr(m, "heads")} == {channels // 64}


def test_width_is_in_whole_heads() -> None:
    for width, heads in ((0.01, 1), (0.34, 1), (0.6, 2), (2.0, 6)):
        with torch.device("meta"):
            model = models.create("vit-tiny", width=width, in_channels=1, image_size=28)
        assert model.positions.shape == (1, 49, 64 * heads)
        assert model.blocks[0].attention.qkv.weight.shape == (3 * 64 * heads, 64 * heads)


@pytest.mark.parametrize("size", [2, 30, 33])
def test_image_that_is_no_multiple_of_the_patch(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size: got {size}, expected a multiple of 4"):
        models.create("vit-tiny", image_size=size)


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match=r"size: got 'huge', expected one of \['small', 'tiny'\]"):
        models.ViT("huge")


def test_block_is_the_published_one() -> None:
    """Against torch's own encoder layer with the same weights."""
    block = models.create("vit-tiny", seed=1).blocks[0].double()
    twin = nn.TransformerEncoderLayer(
        192, 3, 768, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    pairs = {
        "self_attn.in_proj_": block.attention.qkv, "self_attn.out_proj.": block.attention.out,
        "linear1.": block.fc1, "linear2.": block.fc2, "norm1.": block.norm1, "norm2.": block.norm2,
    }  # fmt: skip
    for module in pairs.values():
        nn.init.normal_(module.bias)
    twin.load_state_dict({f"{name}{p}": getattr(m, p) for name, m in pairs.items() for p in ("weight", "bias")})
    x = torch.randn(2, 7, 192, dtype=torch.float64)
    torch.testing.assert_close(block(x), twin(x), rtol=1e-12, atol=1e-12)


def test_positions_matter_and_the_image_is_cut_into_patches() -> None:
    model = small(in_channels=1).double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    swapped = torch.cat([x[:, :, 4:], x[:, :, :4]], 2)  # the upper patches below
    assert not torch.allclose(model(x), model(swapped))
    with torch.no_grad():
        model.positions.zero_()
    torch.testing.assert_close(model(x), model(swapped), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criterion", ["grasp", "magnitude", "snip", "erk", "uniform"])
def test_criteria_prune_it(criterion: str) -> None:
    masks = pruning.prune(small(), 0.9, criterion, data=(torch.randn(8, 3, 8, 8), torch.arange(8)))
    assert len(masks) == 2 + 12 * 4
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.1 * total)


def test_synflow_says_why_it_cannot() -> None:
    with pytest.raises(ValueError, match=r"synflow: blocks\.0\.norm1 is a LayerNorm, whose outputs are no sums"):
        pruning.prune(small(), 0.9, "synflow")
    with pytest.raises(ValueError, match=r"synflow: blocks\.0\.norm1 is a LayerNorm"):
        pruning.scores(small(), "synflow")


def masked(density: float) -> tuple[nn.Module, dict[str, Tensor]]:
    model = small(in_channels=1).double()
    masks = pruning.prune(model, 1 - density, "erk")
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    return model, masks


def train(model: nn.Module, masks: dict[str, Tensor]) -> list[float]:
    """Losses of a few steps; where a weight is dense, its gradient is masked."""
    generator = torch.Generator().manual_seed(3)
    for name, mask in masks.items():
        weight = dict(model.named_parameters()).get(f"{name}.weight")
        if weight is not None:
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    labels = torch.arange(10)
    x = torch.randn(10, 1, 8, 8, dtype=torch.float64, generator=generator)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = functional.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("dense_from_eight_tenths")
@pytest.mark.parametrize(("density", "kernel"), [(0.05, "sparse"), (0.7, "dense")])
def test_sparse_is_the_masked_network(density: float, kernel: str) -> None:
    """Output and every gradient, by the sparse kernels and by dense ones with a masked weight."""
    dense, masks = masked(density)
    sparse = copy.deepcopy(dense)
    report = fk.sparsify_(sparse, masks)
    assert {row.name for row in report} == set(masks)
    assert {row.kernel for row in report if ".attention." in row.name or ".fc" in row.name} == {kernel}
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    dy = torch.randn(3, 10, dtype=torch.float64)
    for model, leaf in zip((dense, sparse), leaves, strict=True):
        y = model(leaf)
        y.backward(dy)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-10, atol=1e-11)
    found = dict(sparse.named_parameters())
    for name, parameter in dense.named_parameters():
        layer, _, last = name.rpartition(".")
        if layer in masks and last == "weight":
            expected, gradient = parameter.grad[masks[layer]], found[f"{layer}.values"].grad
        else:
            expected, gradient = parameter.grad, found[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11, msg=name)


def test_sparse_trains_as_the_masked_network() -> None:
    dense, masks = masked(0.1)
    sparse = fk.sparsify(dense, masks)
    expected, found = train(dense, masks), train(sparse, masks)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0] / 2
    back = fk.densify_(sparse).state_dict()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-7, atol=1e-9)


def test_fusion_of_a_norm_beside_attention() -> None:
    """A batch norm makes the conversion trace the network; attention is no obstacle to that."""
    model = small(in_channels=1)
    model.patches = nn.Sequential(model.patches, nn.BatchNorm2d(64), nn.ReLU())
    masks = {"patches.0": torch.rand(64, 1, 4, 4) < 0.2}
    report = fk.sparsify_(model, masks)
    assert "fused: 1 batch norms with the ReLU after them" in report.notes
    assert not [note for note in report.notes if "cannot trace" in note]
