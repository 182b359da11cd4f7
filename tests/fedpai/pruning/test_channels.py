# SPDX-License-Identifier: Apache-2.0
"""Channels: which belong together, which are kept, and that nothing alive touches a dead one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedpai import models
from fedpai.pruning import kept_count, prunable_layers, prune, structured_masks, summary
from fedpai.pruning.channels import ChannelGroup, channel_groups
from fedpai_kernels.structure import Channel, check

Tensors = dict[str, torch.Tensor]


def groups_of(model: nn.Module, exclude: tuple[str, ...] = ()) -> list[ChannelGroup]:
    return channel_groups(model, prunable_layers(model, exclude))


def test_a_chain_with_flattening() -> None:
    model = models.create("lenet5", image_size=32, seed=0)
    assert groups_of(model) == [
        ChannelGroup(6, ["conv1"], {"conv2": 1}),
        ChannelGroup(16, ["conv2"], {"fc1": 25}),
        ChannelGroup(120, ["fc1"], {"fc2": 1}),
        ChannelGroup(84, ["fc2"], {"classifier": 1}),
    ]


def test_residual_layers_share_their_channels() -> None:
    model = models.create("resnet18", seed=0)
    groups = {group.writers[0]: group for group in groups_of(model)}
    assert groups["conv1"].writers == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert list(groups["conv1"].readers) == [
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer2.0.conv1",
        "layer2.0.shortcut.0",
    ]
    assert groups["layer4.0.conv2"].writers == ["layer4.0.conv2", "layer4.0.shortcut.0", "layer4.1.conv2"]
    assert groups["layer4.0.conv2"].readers == {"layer4.1.conv1": 1, "classifier": 1}
    assert [group.size for group in groups.values()].count(64) == 3
    assert sum(len(group.writers) for group in groups.values()) == 20


class Odd(nn.Module):
    """Everything that holds channels: grouped convolutions, group norm, concatenation, broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 1, groups=3)
        self.free = nn.Conv2d(12, 10, 1)
        self.normed = nn.Conv2d(10, 6, 1)
        self.norm = nn.GroupNorm(2, 6)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 4, 1)
        self.gate = nn.Conv2d(8, 1, 1)
        self.last = nn.Conv2d(8, 9, 1)
        self.fc = nn.Linear(9, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.depthwise(self.stem(x))))
        x = functional.relu(self.free(self.grouped(self.point(x) + 1.0)))
        x = self.norm(self.normed(x))
        x = torch.cat((self.left(x), self.right(x)), 1)
        x = self.last(x + self.gate(x)).mean((2, 3))
        return self.head(self.fc(x.view(x.size(0), -1)).relu())


def test_what_is_not_understood_stays() -> None:
    assert groups_of(Odd()) == [
        ChannelGroup(8, ["stem", "depthwise"], {"point": 1}),
        ChannelGroup(10, ["free"], {"normed": 1}),
        ChannelGroup(9, ["last"], {"fc": 1}),
        ChannelGroup(7, ["fc"], {"head": 1}),
    ]
    assert [group.writers for group in groups_of(Odd(), exclude=("free", "fc"))] == [["stem", "depthwise"]]


class Twice(nn.Module):
    """A layer that is called twice, and one that adds to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.again(self.again(x)) + x)


def test_layers_called_twice_and_loops() -> None:
    assert groups_of(Twice()) == [ChannelGroup(6, ["first", "again"], {"again": 1, "head": 1})]


def test_networks_without_free_channels() -> None:
    held = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    with pytest.raises(
        ValueError, match="no channel of this network can be pruned; those of 0 are held by module 1"
    ):
        prune(held, 0.5, "magnitude", structure="channel")
    with pytest.raises(ValueError, match="those of 0 are held by the network's output"):
        prune(nn.Sequential(nn.Linear(3, 8)), 0.5, "magnitude", structure="channel")

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"structure: 'channel' needs a network that torch\.fx can trace: "):
        prune(Branching(), 0.5, "magnitude", structure="channel")


NETWORKS = ["resnet18", "vgg11", "wrn16x4", "conv4", "conv4-nonorm", "lenet5", "mlp"]


def small(name: str) -> nn.Module:
    model = models.create(name, width=0.25, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms and biases that are not at their neutral start
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.mark.parametrize("name", [*NETWORKS, "odd", "twice"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_dead_channels_touch_nothing(name: str, allocation: str) -> None:
    """The output does not change when everything that dead channels hold is replaced by something else."""
    model = {"odd": Odd, "twice": Twice}[name]() if name in ("odd", "twice") else small(name)
    masks = prune(model, 0.7, "magnitude", structure="channel", allocation=allocation)
    layers = prunable_layers(model)
    assert set(masks) == set(layers)
    with torch.no_grad():
        for layer, mask in masks.items():
            check(mask, Channel(), getattr(layers[layer], "groups", 1))
            layers[layer].weight.mul_(mask)
    x = torch.randn(2, 4) if name == "twice" else torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)

    def disturb(mask: torch.Tensor):  # type: ignore[no-untyped-def]
        dead = ~mask.flatten(1).any(1)

        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            noise = torch.randn_like(output) * 100
            return output + noise * dead.view(1, -1, *[1] * (output.dim() - 2))

        return hook

    some = False
    for layer, mask in masks.items():
        layers[layer].register_forward_hook(disturb(mask))
        some |= bool((~mask.flatten(1).any(1)).any())
    assert some
    torch.testing.assert_close(model(x), expected)
    for group in channel_groups(model, layers):
        written = [masks[layer].flatten(1).any(1) for layer in group.writers]
        read = [masks[n].transpose(0, 1).reshape(group.size, -1).any(1) for n in group.readers]
        assert all(torch.equal(flags, written[0]) for flags in (*written, *read))
        assert written[0].any()


def counts_of(model: nn.Module, masks: Tensors) -> list[int]:
    groups = channel_groups(model, prunable_layers(model))
    return [int(masks[group.writers[0]].flatten(1).any(1).sum()) for group in groups]


def cost(counts: tuple[int, ...], sizes: tuple[int, int, int, int]) -> int:
    """Weights of a chain of three linear layers, of which the two inner widths are counted."""
    return sizes[0] * counts[0] + counts[0] * counts[1] + counts[1] * sizes[3]


SIZES = (3, 7, 12, 5)


def chain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)))


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.8, 0.9])
def test_uniform_is_the_largest_share_that_fits(sparsity: float) -> None:
    model = chain()
    masks = prune(model, sparsity, "magnitude", structure="channel", allocation="uniform")
    budget = kept_count(cost(SIZES[1:3], SIZES), sparsity)
    shares = [s / 10000 for s in range(10001)]
    widths = [tuple(max(1, int(share * size + 1e-9)) for size in SIZES[1:3]) for share in shares]
    least = max((w for w in widths if cost(w, SIZES) <= budget), key=sum)
    found = tuple(counts_of(model, masks))
    assert all(a - b in (0, 1) for a, b in zip(found, least, strict=True))
    assert sum(int(m.sum()) for m in masks.values()) == cost(found, SIZES) <= budget
    # Of the others, none would fit.
    for more in ((least[0] + 1, found[1]), (found[0], least[1] + 1)):
        assert (
            more == found
            or cost(more, SIZES) > budget
            or max(c - s for c, s in zip(more, SIZES[1:3], strict=True)) > 0
        )


@pytest.mark.parametrize("seed", range(5))
def test_global_goes_down_one_ranking(seed: int) -> None:
    model = chain(seed)
    weights = [module.weight.detach().abs().double() for module in model]
    means = [(weights[i].sum(1) + weights[i + 1].sum(0)) / (SIZES[i] + SIZES[i + 2]) for i in (0, 1)]
    budget = kept_count(cost(SIZES[1:3], SIZES), 0.6)
    kept = [{int(mean.argmax())} for mean in means]
    ranking = sorted(((-float(v), g, c) for g, mean in enumerate(means) for c, v in enumerate(mean)))
    for _, group, channel in ranking:
        sizes = [len(k | {channel}) if g == group else len(k) for g, k in enumerate(kept)]
        if cost(tuple(sizes), SIZES) <= budget:
            kept[group].add(channel)
    masks = prune(model, 0.6, "magnitude", structure="channel")
    for i, wanted in enumerate(kept):
        assert set(masks[str(i)].any(1).nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "conv4"])
@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_budgets(name: str, budget: str, allocation: str) -> None:
    model = small(name)
    masks = prune(model, 0.9, "random", structure="channel", budget=budget, allocation=allocation)
    result = summary(masks, model)
    kept, total = (result.kept, result.total) if budget == "weights" else (result.kept_macs, result.macs)
    assert 0.8 * kept_count(total, 0.9) < kept <= kept_count(total, 0.9)
    if allocation == "uniform":
        sizes = [group.size for group in channel_groups(model, prunable_layers(model))]
        counts = counts_of(model, masks)
        # One share gives every count, to one channel.
        assert max((c - 1) / s for c, s in zip(counts, sizes, strict=True)) <= min(
            (c + 1) / s for c, s in zip(counts, sizes, strict=True)
        )


def test_the_seed_decides_random_channels() -> None:
    model = small("vgg11")
    one, two, other = (prune(model, 0.9, "random", structure="channel", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 0.99}, "keeps 2 of 165, less than the 9 of one channel in each of 2 groups"),
        (
            {"allocation": "erk"},
            "allocation: got 'erk', expected one of global, uniform for structure 'channel'",
        ),
        (
            {"criterion": "erk"},
            "allocation: got 'erk', expected one of global, uniform for structure 'channel'",
        ),
    ],
)
def test_refusals(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(chain(), **{"sparsity": 0.5, "criterion": "magnitude", "structure": "channel", **kwargs})


def test_scores_of_a_missing_layer() -> None:
    scores = {name: module.weight.detach() for name, module in prunable_layers(chain()).items()}
    masks = structured_masks(chain(), {n: scores[n] for n in ("0", "1")}, 0.5, structure="channel")
    # Layer 2 has no scores, so it is left dense, and what it reads stays.
    assert set(masks) == {"0", "1"}
    assert masks["1"].any(1).all()
    assert not masks["0"].any(1).all()
