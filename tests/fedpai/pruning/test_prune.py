# SPDX-License-Identifier: Apache-2.0
"""The whole call on real networks: untouched models, determinism, budgets, clients of few classes, bad input."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from fedpai import data, models, pruning
from fedpai.data import Dataset
from fedpai_kernels.structure import check, parse

CRITERIA = pruning.criteria()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return data.synthetic(train_size=200, test_size=10)


@pytest.fixture
def model() -> nn.Module:
    return models.create("resnet18", width=0.125, seed=0)


@pytest.fixture
def batch(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return pruning.balanced_batch(dataset, per_class=2)


def prune(model: nn.Module, criterion: str, sparsity: float = 0.95, **kwargs) -> dict[str, torch.Tensor]:
    if criterion == "synflow":
        kwargs.setdefault("iterations", 5)
    return pruning.prune(model, sparsity, criterion, **kwargs)


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_exact_budget_layers_alive_and_the_model_untouched(
    criterion: str, model: nn.Module, batch: tuple
) -> None:
    model(batch[0]).sum().backward()
    model.layer2.eval()
    model.layer1[0].conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    masks = prune(model, criterion, data=batch)
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.05 * total)
    assert all(m.dtype == torch.bool and m.any() for m in masks.values())
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {n: m.shape for n, m in masks.items()} == shapes

    assert torch.equal(torch.get_rng_state(), state)
    assert equal(dict(before.state_dict()), dict(model.state_dict()))
    for (name, old), (_, new) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert old.requires_grad == new.requires_grad, name
        assert new.grad is None if gradients[name] is None else torch.equal(gradients[name], new.grad), name
    assert [m.training for m in before.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_same_seed_same_masks(criterion: str, model: nn.Module, batch: tuple) -> None:
    one = prune(model, criterion, data=batch, seed=1)
    torch.rand(3)
    assert equal(one, prune(model, criterion, data=batch, seed=1))
    assert equal(one, prune(model, criterion, data=batch, seed=2)) == (
        criterion not in ("erk", "random", "uniform")
    )


def test_data_decides_grasp_and_snip(model: nn.Module, dataset: Dataset) -> None:
    batches = [pruning.balanced_batch(dataset, per_class=2, seed=s) for s in (0, 1)]
    for criterion in ("grasp", "snip"):
        assert not equal(*(prune(model, criterion, data=b) for b in batches))


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_client_that_lacks_classes(criterion: str, model: nn.Module, dataset: Dataset) -> None:
    indices = torch.where((dataset.train_labels == 3) | (dataset.train_labels == 7))[0]
    x, y = pruning.balanced_batch(dataset, indices)
    assert set(y.tolist()) == {3, 7}
    masks = prune(model, criterion, data=(x, y))
    assert all(m.any() for m in masks.values())
    alone = prune(model, criterion, data=dataset.batch(indices[:1]))
    assert sum(int(m.sum()) for m in alone.values()) == sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("name", ["mlp", "lenet5", "conv4-nonorm", "vgg11", "wrn16x4"])
@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_other_networks(name: str, criterion: str) -> None:
    model = models.create(name, width=0.1, in_channels=1, seed=0)
    batch = torch.randn(8, 1, 32, 32), torch.arange(8)
    masks = prune(model, criterion, 0.9, data=batch)
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * total)


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "synflow"])
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_allocation_and_criterion_are_separate(
    criterion: str, allocation: str, model: nn.Module, batch: tuple
) -> None:
    masks = prune(model, criterion, allocation=allocation, data=batch)
    shapes = {n: tuple(m.shape) for n, m in masks.items()}
    assert {n: int(m.sum()) for n, m in masks.items()} == pruning.allocate(shapes, 0.95, allocation)
    if criterion == "magnitude":
        weight, mask = model.conv1.weight.abs(), masks["conv1"]
        assert mask.all() or weight[mask].min() >= weight[~mask].max()
    if allocation == "uniform":
        assert equal(masks, prune(model, criterion, scope="layer", data=batch))


@pytest.mark.parametrize(
    ("structure", "criterion"),
    [
        (structure, criterion)
        for structure in ("4x1", "4x4-taps", "channel", "2:4", "fan-in")
        for criterion in CRITERIA
        if criterion != "erk" or structure not in ("channel", "2:4")
    ],
)
def test_every_criterion_at_every_granularity(
    structure: str, criterion: str, model: nn.Module, batch: tuple
) -> None:
    sparsity = 0.5 if structure == "2:4" else 0.8
    masks = prune(model, criterion, sparsity, data=batch, structure=structure)
    kind = parse(structure)
    for name, mask in masks.items():
        assert mask.any()
        if mask.shape[1] >= 4:  # wide enough for whole blocks and runs
            assert name != "conv1"
            check(mask, kind)
    total, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    if structure == "2:4":
        assert kept == sum(m.numel() * -(-m.shape[1] // 2) // m.shape[1] for m in masks.values())
    else:
        assert 0 <= round(0.2 * total) - kept < (300 if structure == "channel" else 20 * 16)
    again = prune(model, criterion, sparsity, data=batch, structure=structure)
    assert equal(masks, again)


def test_structure_of_a_score_is_the_sum_over_the_block(model: nn.Module, batch: tuple) -> None:
    """The blocks of SNIP are those of its summed scores, not of its best weights."""
    scores = pruning.scores(model, "snip", data=batch)["layer4.1.conv2"]
    sums = scores.double().unflatten(0, (-1, 4)).sum(1)
    masks = prune(model, "snip", 0.8, data=batch, structure="4x1")
    kept = masks["layer4.1.conv2"].unflatten(0, (-1, 4))[:, 0]
    assert sums[kept].min() >= sums[~kept].max()


def test_layers_may_be_emptied_when_asked(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer3[0].conv2.weight.mul_(1e-6)
    assert int(prune(model, "magnitude")["layer3.0.conv2"].sum()) == 1
    free = prune(model, "magnitude", keep_layers_alive=False)
    assert not free["layer3.0.conv2"].any()
    kept = round(0.05 * sum(m.numel() for m in free.values()))
    assert sum(int(m.sum()) for m in free.values()) == kept


@pytest.mark.parametrize("exclude", [("conv1", "classifier"), lambda n, _: n in ("conv1", "classifier")])
def test_excluded_layers_get_no_mask(exclude, model: nn.Module, batch: tuple) -> None:
    for criterion in CRITERIA:
        masks = prune(model, criterion, data=batch, exclude=exclude)
        assert not {"conv1", "classifier"} & set(masks)
        total = sum(m.numel() for m in masks.values())
        assert sum(int(m.sum()) for m in masks.values()) == round(0.05 * total)
    assert list(pruning.prunable_layers(model, "classifier")) == [*list(pruning.prunable_layers(model))[:-1]]


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_under_no_grad_and_inference_mode(criterion: str, model: nn.Module, batch: tuple) -> None:
    expected = prune(model, criterion, data=batch)
    with torch.no_grad():
        assert equal(expected, prune(model, criterion, data=batch))
    with torch.inference_mode():
        assert equal(expected, prune(model, criterion, data=batch))


def test_zero_sparsity_keeps_everything(model: nn.Module, batch: tuple) -> None:
    for criterion in CRITERIA:
        assert all(m.all() for m in prune(model, criterion, 0.0, data=batch).values())


def test_one_mask_from_averaged_client_scores(model: nn.Module, dataset: Dataset) -> None:
    clients = data.partition_dirichlet(dataset.train_labels, 3, 0.5, seed=0)
    gathered = [
        pruning.scores(model, "grasp", data=pruning.balanced_batch(dataset, c, per_class=2)) for c in clients
    ]
    for client in gathered:
        assert sum(s.abs().sum().item() for s in client.values()) == pytest.approx(1, rel=1e-4)
    one = pruning.masks_from_scores(pruning.average_scores(gathered[:1]), 0.95)
    direct = prune(model, "grasp", data=pruning.balanced_batch(dataset, clients[0], per_class=2))
    assert equal(one, direct)
    shared = pruning.masks_from_scores(pruning.average_scores(gathered, [len(c) for c in clients]), 0.95)
    assert not equal(shared, one)


def test_dropout_is_off_while_scoring(batch: tuple) -> None:
    layers = [nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10)]
    model = nn.Sequential(*layers)
    without = nn.Sequential(*layers[:3], layers[4])
    with_dropout = pruning.scores(model, "snip", data=batch)
    torch.testing.assert_close(
        list(with_dropout.values()), list(pruning.scores(without, "snip", data=batch).values())
    )


class Idle(nn.Module):
    """Has a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_layer_that_the_output_does_not_need(criterion: str) -> None:
    batch = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    found = pruning.scores(Idle(), criterion, data=batch)
    assert found["fc"].abs().min() > 0
    assert found["spare"].abs().max() == 0


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_scores_that_are_all_zero(criterion: str) -> None:
    with pytest.raises(ValueError, match=f"{criterion} gives 0 for every weight"):
        pruning.scores(nn.Linear(3, 2), criterion, data=(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))


def test_nan_weight_names_the_layer(model: nn.Module, batch: tuple) -> None:
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores: layer2\.0\.conv1 has 1 of 1152 scores that are NaN"):
        prune(model, "magnitude")
    with pytest.raises(ValueError, match=r"scores: layer2\.0\.conv1 has 1"):
        prune(model, "synflow")
    with pytest.raises(ValueError, match=r"scores: conv1 has \d+ of 216 scores that are NaN"):
        prune(model, "snip", data=batch)


def test_nan_image_is_named(model: nn.Module, batch: tuple) -> None:
    x, y = batch
    bad = x.clone()
    bad[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"conv1 has .* images of batch 1 hold NaN or infinity"):
        prune(model, "grasp", data=[(x, y), (bad, y)])


def test_synflow_of_a_cut_network(model: nn.Module) -> None:
    model.layer3[0].conv2.weight.data.zero_()
    model.layer3[0].shortcut[0].weight.data.zero_()
    with pytest.raises(ValueError, match="no path from input to output is left"):
        prune(model, "synflow")


def test_shared_weight(batch: tuple) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="1: shares its weight with 0"):
        prune(model, "random")
    assert list(prune(model, "random", 0.5, exclude=["1"])) == ["0"]


def test_weight_under_torch_pruning(model: nn.Module) -> None:
    torch_prune.l1_unstructured(model.conv1, "weight", 0.5)
    with pytest.raises(ValueError, match="conv1: its weight is not a plain parameter"):
        prune(model, "magnitude")


def test_input_shape_of_unknown_models() -> None:
    convolutional = nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert len(prune(convolutional, "synflow", 0.5)) == 2
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match="input_shape: cannot be inferred"):
        prune(linear, "synflow", 0.5)
    assert len(prune(linear, "synflow", 0.5, input_shape=(3, 2, 2))) == 1
    assert len(prune(linear, "synflow", 0.5, data=(torch.rand(1, 12), torch.tensor([0])))) == 1


X, Y = torch.randn(4, 3, 32, 32), torch.arange(4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "gras"}, "criterion: got 'gras', expected one of .*grasp"),
        ({"criterion": "grasp"}, r"data: criterion 'grasp' needs \(images, labels\), got None"),
        ({"criterion": "snip", "data": []}, "data: got no batches"),
        ({"criterion": "snip", "data": [X]}, "batch 0 is a Tensor, expected"),
        ({"criterion": "snip", "data": (X, Y[:3])}, r"images \(4, 3, 32, 32\) and labels \(3,\)"),
        ({"criterion": "snip", "data": (X[:0], Y[:0])}, "at least one"),
        ({"criterion": "random", "sparsity": 1.0}, "sparsity: got 1.0"),
        ({"criterion": "random", "sparsity": 0.9999}, "fewer than the 21 layers that must each keep one"),
        (
            {"criterion": "random", "exclude": ["layer9"]},
            "exclude: no convolution or linear layer is called layer9",
        ),
        ({"criterion": "random", "exclude": lambda *_: True}, "no nn.Conv2d or nn.Linear is left"),
        ({"criterion": "erk", "allocation": "uniform"}, "criterion 'erk' is an allocation itself"),
        ({"criterion": "uniform", "scope": "global"}, "criterion 'uniform' is an allocation itself"),
        ({"criterion": "magnitude", "iterations": 3}, "iterations: got 3"),
        ({"criterion": "synflow", "iterations": 0}, "iterations: got 0"),
        ({"criterion": "random", "allocation": "layer"}, "allocation: got 'layer'"),
        ({"criterion": "random", "structure": "4:2"}, "structure: got '4:2', expected 'weight'"),
        ({"criterion": "random", "structure": "2:4"}, "sparsity: got 0.9, but structure 2:4 removes 0.5"),
        ({"criterion": "random", "budget": "params"}, "budget: got 'params'"),
    ],
)
def test_refusals(kwargs: dict, message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.prune(model, **{"sparsity": 0.9, **kwargs})


def test_impossible_budget_fails_before_the_scoring(model: nn.Module, batch: tuple) -> None:
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="sparsity"):
        prune(model, "grasp", 0.99999, data=batch)
