# SPDX-License-Identifier: Apache-2.0
"""One mask for everybody that the server chooses alone, from the initial weights and the seed."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from fedpai import pruning
from fedpai.federation.config import ConfigError, RunConfig, option
from fedpai.federation.layout import MaskSet
from fedpai.federation.seeds import derive
from fedpai.federation.server import Server
from fedpai.methods.base import MERGES, Method


class FixedMask(Method):
    """Base of methods whose criterion needs no data. The mask travels once; values travel packed."""

    uses = MERGES | {"sparsity", "allocation", "structure", "budget"}
    criterion: ClassVar[str]

    def choose_masks(self, server: Server) -> None:
        """Prunes the initial model at the server."""
        server.set_mask(prune_at_server(server, self.config, self.criterion))


def prune_at_server(server: Server, config: RunConfig, criterion: str) -> MaskSet:
    """A mask over the server's model, by a criterion that needs no data.

    Args:
        config: the method's; it may differ from the run's in what the method leaves no choice about.

    Raises:
        ConfigError: a sparsity, allocation or structure that the model cannot have.
    """
    try:
        masks = pruning.prune(
            server.model(),
            config.sparsity,
            criterion,
            allocation=config.allocation,
            seed=derive(config.seed, "mask"),
            structure=config.structure,
            budget=config.budget,
        )
    except ValueError as error:
        raise refusal(config, error) from None
    return MaskSet.from_masks(server.layout, masks)


def chooser(config: RunConfig, model: nn.Module) -> pruning.Chooser:
    """What turns scores of a run's model into masks, and checks the masks that clients send.

    Raises:
        ConfigError: a sparsity, allocation, structure or criterion that the model cannot have.
    """
    if config.criterion == "synflow" and (norm := pruning.first_layer_norm(model)) is not None:
        raise ConfigError(
            f"--criterion {config.criterion}: --model {config.model} has a LayerNorm ({norm}), whose outputs are no "
            "sums over positive paths; choose another criterion or model"
        )
    try:
        _, allocation = pruning.split_alias(config.criterion, config.allocation)
        return pruning.chooser(
            model,
            config.sparsity,
            allocation=allocation,
            structure=config.structure,
            budget=config.budget,
        )
    except ValueError as error:
        raise refusal(config, error) from None


def refusal(config: RunConfig, error: ValueError) -> ConfigError:
    """What pruning refused, under the option that it speaks of."""
    spoken = str(error).split(":", 1)[0]
    key = spoken if spoken in ("criterion", "allocation", "structure", "budget") else "sparsity"
    if key == "allocation" and config.allocation is None:
        key = "criterion"  # whose own allocation it is
    return ConfigError(f"{option(key)} {getattr(config, key)}: {error}")
