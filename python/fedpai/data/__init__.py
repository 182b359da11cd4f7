# SPDX-License-Identifier: Apache-2.0
"""Images and how clients share them.

>>> dataset = load("fashion-mnist")
>>> clients = partition_dirichlet(dataset.train_labels, num_partitions=10, alpha=0.5, seed=0)
>>> x, y = dataset.batch(clients[0][:32])

Whole data sets are held in memory as uint8; floats are made batch by batch. Nothing is ever downloaded, and
synthetic images are used only when they are asked for by name.
"""

from fedpai.data.dataset import DataError, Dataset
from fedpai.data.loading import load, names
from fedpai.data.partition import partition_dirichlet, partition_iid, partition_shards
from fedpai.data.sampling import balanced_batch, iterate_batches
from fedpai.data.synthetic import synthetic

__all__ = [
    "DataError",
    "Dataset",
    "balanced_batch",
    "iterate_batches",
    "load",
    "names",
    "partition_dirichlet",
    "partition_iid",
    "partition_shards",
    "synthetic",
]
