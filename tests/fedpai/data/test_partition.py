# SPDX-License-Identifier: Apache-2.0
"""Partitions: every index exactly once, sizes and classes as promised, impossible requests refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpai.data import partition_dirichlet, partition_iid, partition_shards

LABELS = torch.arange(1000) % 10
label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=80)


def assert_partition(parts: list[torch.Tensor], total: int) -> None:
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(total))
    assert all(part.dtype == torch.int64 and torch.equal(part, part.sort().values) for part in parts)


@given(label_lists, st.data())
def test_iid_covers_every_index_once(labels: list[int], draw: st.DataObject) -> None:
    clients = draw.draw(st.integers(1, len(labels)))
    parts = partition_iid(labels, clients, seed=draw.draw(st.integers(0, 9)))
    assert len(parts) == clients
    assert_partition(parts, len(labels))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(label_lists, st.data())
@settings(max_examples=60, deadline=None)
def test_dirichlet_covers_every_index_once(labels: list[int], draw: st.DataObject) -> None:
    clients = draw.draw(st.integers(1, len(labels)))
    alpha = draw.draw(st.sampled_from([0.01, 0.3, 1.0, 50.0]))
    parts = partition_dirichlet(
        labels, clients, alpha, min_partition_size=0, seed=draw.draw(st.integers(0, 9))
    )
    assert len(parts) == clients
    assert_partition(parts, len(labels))


@given(label_lists, st.data())
@settings(max_examples=100, deadline=None)
def test_shards_give_each_client_its_number_of_classes(labels: list[int], draw: st.DataObject) -> None:
    clients = draw.draw(st.integers(1, len(labels)))
    wanted = draw.draw(st.integers(1, len(set(labels))))
    seed = draw.draw(st.integers(0, 9))
    places = clients * wanted
    if not len(set(labels)) <= places <= np.minimum(np.bincount(labels), clients).sum():
        with pytest.raises(ValueError, match=r"num_classes_per_partition|num_partitions"):
            partition_shards(labels, clients, wanted, seed)
        return
    parts = partition_shards(labels, clients, wanted, seed)
    assert_partition(parts, len(labels))
    assert all(len(torch.tensor(labels)[part].unique()) == wanted for part in parts)


def test_alpha_decides_how_uneven_clients_are() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition_dirichlet(LABELS, 5, alpha, seed=0)
        return float(np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts]))

    assert largest_share(1000.0) < 0.13 < 0.25 < largest_share(0.1)


def test_minimum_size_is_kept() -> None:
    for seed in range(5):
        assert min(map(len, partition_dirichlet(LABELS, 10, 0.3, min_partition_size=30, seed=seed))) >= 30


def test_shards_of_balanced_classes_are_equal() -> None:
    parts = partition_shards(LABELS, 10, 2)
    assert [len(part) for part in parts] == [100] * 10


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: partition_iid(LABELS, 7, seed=seed),
        lambda seed: partition_dirichlet(LABELS, 7, 0.5, seed=seed),
        lambda seed: partition_shards(LABELS, 10, 3, seed=seed),
    ],
)
def test_seed_decides(make) -> None:
    one, two, other = make(3), make(3), make(4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition_iid([], 1), "labels: got"),
        (lambda: partition_iid(torch.rand(4), 1), "labels: got float32"),
        (lambda: partition_iid(LABELS, 0), "num_partitions: got 0, expected 1 to 1000"),
        (lambda: partition_iid(LABELS, 1001), "num_partitions: got 1001"),
        (lambda: partition_dirichlet(LABELS, 5, 0.0), "alpha: got 0.0"),
        (lambda: partition_dirichlet(LABELS, 5, float("inf")), "alpha: got inf"),
        (lambda: partition_dirichlet(LABELS, 5, 1.0, -1), "min_partition_size: got -1"),
        (lambda: partition_dirichlet(LABELS, 5, 1.0, 201), "5 partitions of at least 201 need 1005 images"),
        (lambda: partition_dirichlet(LABELS, 50, 0.01, 15), r"none of 1000 draws with alpha 0.01 .*best: \d"),
        (lambda: partition_shards(LABELS, 4, 2), "hold at most 8 of the 10 classes"),
        (lambda: partition_shards(LABELS, 4, 11), "num_classes_per_partition: got 11, expected 1 to 10"),
        (lambda: partition_shards([0] * 5 + [1], 6, 2), "too few images to fill 12 places"),
    ],
)
def test_impossible_requests(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
