# SPDX-License-Identifier: Apache-2.0
"""ResNet of basic blocks, in the form for 32x32 images (He et al., arXiv 1512.03385)."""

from __future__ import annotations

import torch
from torch import nn

from fedpai.models.init import Network, init_kaiming_, scaled

# Basic blocks in each of the four stages and the stages' channels.
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
CHANNELS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or 1x1 convolution and norm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(Network):
    """A 3x3 stem, four stages of basic blocks (the last three halve the image), one linear layer.

    Args:
        depth: 18 or 34.
        num_classes: outputs.
        in_channels: channels of the image.
        width: factor on all channel counts.
    """

    def __init__(
        self, depth: int, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth: got {depth}, expected one of {sorted(DEPTHS)}")
        channels = scaled(CHANNELS[0], width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        stages: list[nn.Module] = []
        for stage, (blocks, base) in enumerate(zip(DEPTHS[depth], CHANNELS, strict=True)):
            out = scaled(base, width)
            layers: list[nn.Module] = []
            for block in range(blocks):
                layers.append(BasicBlock(channels, out, stride=2 if stage and block == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(self.flatten(self.pool(x)))
