# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks with pre-activation blocks (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

import torch
from torch import nn

from fedpai.models.init import Network, init_kaiming_, scaled


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice. Where the shape changes, the shortcut is a 1x1 convolution of the
    activated input; elsewhere it is the input itself."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != channels
        self.shortcut: nn.Module = nn.Identity()
        if self.projects:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(x))
        kept = self.shortcut(y if self.projects else x)
        return self.conv2(self.relu2(self.bn2(self.conv1(y)))) + kept


class WideResNet(Network):
    """WRN-``depth``-``widen``: a 3x3 stem of 16 channels, stages of ``widen`` times 16, 32, 64 channels.

    Args:
        depth: 6 n + 4 with n blocks in a stage; 28 in the paper's main network.
        widen: the paper's k; 10 in the paper's main network.
        num_classes: outputs.
        in_channels: channels of the image.
        width: a further factor on all channel counts, the stem's included.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: got {depth}, expected 6 n + 4 with n >= 1 (10, 16, 22, 28, 40, ...)")
        if widen < 1:
            raise ValueError(f"widen: got {widen}, expected at least 1")
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for stage in range(3):
            out = scaled(16 * 2**stage * widen, width)
            layers: list[nn.Module] = []
            for block in range((depth - 4) // 6):
                layers.append(PreActivationBlock(channels, out, stride=2 if stage and block == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.classifier(self.flatten(self.pool(self.relu(self.bn(x)))))
