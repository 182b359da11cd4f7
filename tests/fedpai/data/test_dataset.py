# SPDX-License-Identifier: Apache-2.0
"""The in-memory record, batches, samplers and the synthetic images."""

import pytest
import torch
from torch import nn

from fedpai import data, models
from fedpai.data import DataError, Dataset


@pytest.fixture
def small() -> Dataset:
    return data.synthetic(num_classes=4, image_size=12, train_size=40, test_size=8, seed=5)


def test_normalised_training_images_have_mean_0_and_std_1(small: Dataset) -> None:
    x, y = small.batch(torch.arange(40))
    assert x.dtype == torch.float32
    assert torch.equal(y, small.train_labels)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_test_split_uses_training_moments(small: Dataset) -> None:
    x, _ = small.batch([3, 3], split="test")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (small.mean, small.std))
    torch.testing.assert_close(x[1], (small.test_images[3] / 255 - mean) / std)


def test_constant_channel_is_not_divided_by_zero() -> None:
    images, labels = torch.full((3, 1, 2, 2), 7, dtype=torch.uint8), torch.tensor([0, 1, 0])
    x, _ = Dataset.from_arrays("flat", (images, labels), (images, labels), 2).batch([0])
    torch.testing.assert_close(x, torch.zeros(1, 1, 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("indices", [[0, 40], [-1], torch.tensor([41])])
def test_index_out_of_range(small: Dataset, indices: object) -> None:
    with pytest.raises(IndexError, match="expected 0 to 39"):
        small.batch(indices)


def test_bad_indices_and_split(small: Dataset) -> None:
    for wrong in ([0.5], [[1]], torch.ones(40, dtype=torch.bool)):
        with pytest.raises(ValueError, match="indices: got"):
            small.batch(wrong)
    with pytest.raises(ValueError, match="split: got 'valid'"):
        small.batch([0], split="valid")
    assert small.batch([])[0].shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((torch.zeros(2, 1, 4, 4), [0, 1]), None, "training images are torch.float32"),
        ((torch.zeros(0, 1, 4, 4, dtype=torch.uint8), []), None, "expected at least one image"),
        ((torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0]), None, "2 training images but 1 labels"),
        ((torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 2]), None, "run from 0 to 2, expected 0 to 1"),
        (None, (torch.zeros(2, 1, 5, 5, dtype=torch.uint8), [0, 1]), r"test images \(1, 5, 5\)"),
    ],
)
def test_inconsistent_arrays(train: tuple | None, test: tuple | None, message: str) -> None:
    good = (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1])
    splits = [(x, torch.tensor(y, dtype=torch.int64)) for x, y in (train or good, test or good)]
    with pytest.raises(DataError, match=message):
        Dataset.from_arrays("odd", splits[0], splits[1], 2)


def test_batches_visit_each_index_once_in_an_order_the_generator_decides(small: Dataset) -> None:
    chosen = torch.arange(0, 40, 2)

    def order(seed: int | None) -> list[torch.Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [x for x, _ in data.iterate_batches(small, chosen, 6, generator=generator)]

    assert [len(x) for x in order(None)] == [6, 6, 6, 2]
    assert torch.equal(torch.cat(order(None)), small.batch(chosen)[0])
    assert torch.equal(torch.cat(order(1)), torch.cat(order(1)))
    assert not torch.equal(torch.cat(order(1)), torch.cat(order(2)))
    sums = [torch.cat(order(seed)).flatten(1).sum(1).sort().values for seed in (None, 1)]
    torch.testing.assert_close(*sums)
    assert [len(x) for x, _ in data.iterate_batches(small, chosen, 6, drop_last=True)] == [6, 6, 6]
    assert sum(len(x) for x, _ in data.iterate_batches(small, split="test")) == 8
    assert list(data.iterate_batches(small, [])) == []
    with pytest.raises(ValueError, match="batch_size: got 0"):
        data.iterate_batches(small, None, 0)


def test_balanced_batch_takes_what_is_there(small: Dataset) -> None:
    labels = small.train_labels
    indices = torch.cat([torch.where(labels == 0)[0], torch.where(labels == 2)[0][:3]])
    x, y = data.balanced_batch(small, indices, per_class=5, seed=1)
    assert len(x) == len(y) == 8
    assert torch.bincount(y).tolist() == [5, 0, 3]
    assert not torch.equal(y, y.sort().values)
    again = data.balanced_batch(small, indices, per_class=5, seed=1)
    assert torch.equal(again[0], x)
    assert not torch.equal(data.balanced_batch(small, indices, per_class=5, seed=2)[0], x)
    assert torch.bincount(data.balanced_batch(small)[1]).tolist() == [10] * 4
    with pytest.raises(ValueError, match="indices: got none"):
        data.balanced_batch(small, [])
    with pytest.raises(ValueError, match="per_class: got 0"):
        data.balanced_batch(small, per_class=0)


def test_synthetic_is_balanced_and_decided_by_its_seed() -> None:
    one, two, other = (data.synthetic(train_size=103, test_size=20, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.train_images, two.train_images)
    assert not torch.equal(one.train_images, other.train_images)
    counts = torch.bincount(one.train_labels)
    assert counts.max() - counts.min() == 1
    assert data.load("synthetic").image_shape == (3, 32, 32)
    assert data.load("synthetic-gray", image_size=28).image_shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 21}, "num_classes: got 21"),
        ({"in_channels": 2}, "in_channels: got 2"),
        ({"image_size": 7}, "image_size: got 7"),
        ({"train_size": 9}, "train_size: got 9"),
        ({"test_size": 0}, "test_size: got 0"),
    ],
)
def test_synthetic_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.synthetic(**kwargs)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_network_learns_the_synthetic_images(channels: int) -> None:
    dataset = data.synthetic(in_channels=channels, image_size=24, train_size=800, test_size=300)
    model = models.create("conv4", in_channels=channels, width=0.125, image_size=24, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for x, y in data.iterate_batches(dataset, None, 32, generator=generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    x, y = dataset.batch(torch.arange(300), split="test")
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.7
