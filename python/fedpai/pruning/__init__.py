# SPDX-License-Identifier: Apache-2.0
"""Pruning at initialisation: which weights a network keeps, decided before training.

>>> masks = prune(model, 0.98, "grasp", data=balanced_batch(dataset, indices))
>>> print(summary(masks, model))

Choices are separate. The *criterion* scores every weight (higher = keep). The *allocation* says how many
weights each layer keeps: one ranking over all layers, or counts fixed beforehand (uniform, ERK, by multiply-adds,
by time, given); see docs/methods/allocation.md. Masks
are ``{module name: bool tensor of the weight's shape}``; only weights of convolutions and linear layers are
pruned.

A *structure* says what is kept or removed together (blocks, channels, N:M, ...), a *budget* what the sparsity is a
share of: the weights or the multiply-adds.

A federation that shares one mask averages its clients' :func:`scores` with :func:`average_scores` and calls
:func:`masks_from_scores` at the server, or with a structure :func:`structured_masks`. Random, magnitude and
SynFlow need no data, so the server alone can make that mask.
"""

from fedpai.data.sampling import balanced_batch
from fedpai.pruning.allocation import allocate, kept_count, parse_allocation
from fedpai.pruning.choose import BUDGETS, Chooser, chooser, structured_masks
from fedpai.pruning.layers import prunable_layers
from fedpai.pruning.masks import average_scores, masks_from_scores
from fedpai.pruning.prune import criteria, prune, scores, split_alias
from fedpai.pruning.summary import LayerSummary, Summary, summary
from fedpai.pruning.synflow import first_layer_norm

__all__ = [
    "BUDGETS",
    "Chooser",
    "LayerSummary",
    "Summary",
    "allocate",
    "average_scores",
    "balanced_batch",
    "chooser",
    "criteria",
    "first_layer_norm",
    "kept_count",
    "masks_from_scores",
    "parse_allocation",
    "prunable_layers",
    "prune",
    "scores",
    "split_alias",
    "structured_masks",
    "summary",
]
