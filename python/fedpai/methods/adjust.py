# SPDX-License-Identifier: Apache-2.0
"""Moving a mask while training goes on: small weights out, large gradients in, as many of each layer as before."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedpai import pruning
from fedpai.federation.client import Client, ClientError
from fedpai.federation.layout import MaskSet, module_of
from fedpai.federation.payload import PayloadError
from fedpai.federation.server import Server
from fedpai.pruning.criteria import set_scoring_mode
from fedpai.pruning.layers import Tensors
from fedpai.pruning.masks import masks_from_counts


def adjusted(client: Client, moved: float) -> MaskSet:
    """The client's mask with that share of each layer's smallest weights out and as many new ones in.

    New ones are those with the largest gradient, of the loss on one random batch of the client's images, among all
    that the mask then lacks. One that is taken out and brought back at once keeps its value.
    """
    mask, model = client.memory.mask, client.model()
    if mask is None:
        raise PayloadError(f"client {client.id} was sent no mask")
    kept, before = mask.masks(), counts(mask)
    layers = pruning.prunable_layers(model)
    weights: Tensors = {name: layers[name].weight for name in kept}
    changes = {name: round(moved * count) for name, count in before.items()}
    sizes = {name: tensor.detach().abs() for name, tensor in weights.items()}
    try:
        stay = masks_from_counts(sizes, {name: before[name] - changes[name] for name in kept}, kept)
        absent = {name: ~flags for name, flags in stay.items()}
        grown = masks_from_counts(gradient_sizes(client, model, weights), changes, absent)
    except ValueError as error:
        raise ClientError(f"adjusting its mask failed: {error}") from None
    return MaskSet.from_masks(client.layout, {name: stay[name] | grown[name] for name in kept})


def gradient_sizes(client: Client, model: nn.Module, weights: Tensors) -> Tensors:
    """|dL/dw| of all weights, kept or not, on one random batch."""
    draw = np.random.default_rng(client.seed("images to grow by"))
    count = min(client.config.batch, client.examples)
    x, y = client.data.batch(draw.choice(client.indices, count, replace=False))
    set_scoring_mode(model)
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {name: gradient.abs() for name, gradient in zip(weights, gradients, strict=True)}


def largest_weights(server: Server, kept: dict[str, int]) -> MaskSet:
    """The largest of the global model's weights, so many of each layer."""
    layout = server.layout
    floats, _ = server.dense()
    within = None if server.mask is None else server.mask.masks()
    sizes = layout.by_layer(np.abs(floats[: layout.weight_count]))
    return MaskSet.from_masks(layout, masks_from_counts(sizes, kept, within))


def counts(mask: MaskSet) -> dict[str, int]:
    """Weights that a mask keeps of each layer."""
    return {module_of(slot): where.stop - where.start for slot, where in mask.parts()}
