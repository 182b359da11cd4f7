# SPDX-License-Identifier: Apache-2.0
"""What all networks share: their base class, channel counts and initial weights."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """Base of the networks here: a module that may know the shape of the image it was built for."""

    # (channels, height, width); None when the network was built directly and takes any size.
    input_shape: tuple[int, int, int] | None = None


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least one."""
    return max(1, round(channels * width))


def init_kaiming_(model: nn.Module) -> None:
    """Draw every weight from torch's global generator, in module order.

    Convolutions and hidden linear layers: normal with variance ``2 / fan_in`` (He et al., arXiv 1502.01852).
    The last linear layer feeds no ReLU and gets variance ``1 / fan_in``. Biases start
    at 0, norms as the identity.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classifier = linears[-1] if linears else None
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module is classifier:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
