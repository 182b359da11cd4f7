# SPDX-License-Identifier: Apache-2.0
"""Pruning at initialisation: which weights a network keeps, decided before training.

>>> masks = prune(model, 0.98, "grasp", data=balanced_batch(dataset, indices))
>>> print(summary(masks, model))

Two choices are separate. The *criterion* scores every weight (higher = keep). The *allocation* says how many
weights each layer keeps: one ranking over all layers, or counts fixed beforehand (uniform, ERK, given). Masks
are ``{module name: bool tensor of the weight's shape}``; only weights of convolutions and linear layers are
pruned.

A federation that shares one mask averages its clients' :func:`scores` with :func:`average_scores` and calls
:func:`masks_from_scores` at the server. Random, magnitude and SynFlow need no data, so the server alone
can make that mask.
"""

from fedpai.data.sampling import balanced_batch
from fedpai.pruning.allocation import allocate, kept_count
from fedpai.pruning.choose import BUDGETS, Chooser, chooser, structured_masks
from fedpai.pruning.layers import prunable_layers
from fedpai.pruning.masks import average_scores, masks_from_scores
from fedpai.pruning.prune import criteria, prune, scores
from fedpai.pruning.summary import LayerSummary, Summary, summary

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
    "kept_count",
    "masks_from_scores",
    "prunable_layers",
    "prune",
    "scores",
    "structured_masks",
    "summary",
]
